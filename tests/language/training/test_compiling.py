"""Code is compiled where the run is long enough to pay it back, and elsewhere if it is asked for."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from tiny_models import PROMPTS, make_learner, make_policy, make_task

import tokenrl
from tokenrl.language.training import compiling
from tokenrl.language.training.compiling import _wrong, settle_compilation

ROWS = [{"prompt": p} for p in PROMPTS]


class Step:
    """Stands for compiled code: the model itself, or something that failed."""

    made: list
    failure = ""
    kept = False
    seconds = 12.0

    making = False

    def __init__(self, directory):
        self.directory, self.wanted = directory, {}
        self.made.append(self)

    def __call__(self, model, token, cache, places):
        if not (self.making or self.failure):
            self.wanted = {"padded": Path(__file__) if self.kept else self.directory / "none.bin"}
        return model(token[:, None], **cache.arguments(places), use_cache=True).logits[:, -1]


@pytest.fixture
def settled(monkeypatch, tmp_path):
    """Settle, with a clock that says that sampling takes these seconds, in turn."""
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path))

    def settle(
        seconds,
        *,
        small=0,
        estimator="rloo",
        step=None,
        processes=1,
        clock=None,
        **options,
    ):
        attributes = {"made": [], **(step or {})}
        kind = type("Made", (Step,), attributes)
        monkeypatch.setattr(compiling, "CompiledStep", kind)
        monkeypatch.setattr(compiling, "SMALL", small)
        times = itertools.cycle(seconds)
        monkeypatch.setattr(compiling, "seconds_of", clock or (lambda way: (way(), next(times))[1]))
        learner = make_learner(make_policy(), estimator, **{"compile_training": False} | options)
        if processes > 1:
            learner.accelerator = type("Several", (), {"num_processes": processes})()
        settle_compilation(learner, ROWS)
        assert bool(kind.made) or not hasattr(learner.generator, "step") or learner.generator.step is None
        assert (learner.generator.step is not None) == learner.args.compile_sampling
        return learner, kind.made

    return settle


LONG = {"max_steps": 10_000}


@pytest.mark.parametrize(
    ("seconds", "steps", "kept", "taken"),
    [
        # 4 s to load, (8 + .35 x 21 modules) s more to compile; a quarter saved, worth twice what it costs
        (0.1, 1_547, False, False),
        (0.1, 1_549, False, True),
        (0.1, 319, True, False),
        (0.1, 320, True, True),
        (0.01, 10_000, False, False),
    ],
)
def test_a_run_must_be_long_enough(seconds, steps, kept, taken, settled):
    learner, made = settled([seconds, *(seconds, seconds / 2) * 3], max_steps=steps, step={"kept": kept})
    assert learner.args.compile_sampling is taken
    assert len(made) == 1 and made[0].directory.name == "compiled"
    if taken:
        assert learner.generator.step is made[0]
        assert "ready after 12 s" in learner.policy.remarks["compiled sampling"]


@pytest.mark.parametrize(("quick", "taken"), [(0.5, True), (0.9, True), (0.92, False), (1.5, False)])
def test_code_that_is_hardly_faster_is_left(quick, taken, settled):
    learner, _ = settled([1.0, *(1.0, quick) * 3], **LONG)
    assert learner.args.compile_sampling is taken
    assert f"in {quick:.2g} s, 1 s without it" in learner.policy.remarks["compiled sampling"]


@pytest.mark.parametrize(
    "options",
    [
        *({"small": 10**9}, {"check": True}, {"processes": 2}, {"estimator": "a2c"}, {"max_steps": 19}),
        *({"compile_sampling": False}, {"compile_sampling": True, "estimator": "a2c"}),
    ],
)
def test_nothing_is_measured_where_it_makes_no_sense(options, settled):
    learner, made = settled([], **(LONG | options))
    assert learner.args.compile_sampling is False and made == []
    assert "compiled sampling" not in learner.policy.remarks


def test_it_can_be_asked_for_without_a_measurement(settled):
    learner, made = settled([], compile_sampling=True, small=10**9, max_steps=1)
    assert learner.args.compile_sampling is True and learner.generator.step is made[0]
    assert learner.policy.remarks["compiled sampling"] == "as set"


@pytest.mark.parametrize("asked", [None, True])
def test_a_failure_is_said_where_it_was_asked_for(asked, settled):
    learner, _ = settled([1.0], compile_sampling=asked, step={"failure": "no compiler"}, **LONG)
    assert learner.args.compile_sampling is False
    remark = learner.policy.remarks.get("compiled sampling")
    assert remark == ("none (no compiler)" if asked else None)


class Layers:
    """Stands for compiled layers: the model itself, or something that failed."""

    made, failure, seconds, making, missing, off = 2, "", 40.0, False, 2, 0.0

    def __init__(self, model, directory):
        self.model, self.directory, self.wanted = model, directory, {}

    @contextlib.contextmanager
    def inside(self):
        if not self.making:
            self.wanted = {k: self.directory / f"{k}.bin" for k in range(self.missing)}
            for path in self.wanted.values():
                assert not path.exists()
        handle = self.model.lm_head.register_forward_hook(lambda _m, _x, logits: logits * (1 + self.off))
        yield
        handle.remove()


@pytest.fixture
def trained(monkeypatch, settled):
    """Settle, with a clock that says that updates take these seconds, in turn."""

    def settle(seconds, *, layers=None, **options):
        kind = type("Compiled", (Layers,), layers or {})
        monkeypatch.setattr(compiling, "CompiledLayers", kind)

        def timed(work):
            work()
            return next(times)

        times = itertools.chain(seconds)
        options = {"compile_training": None, "compile_sampling": False} | options
        learner, _ = settled([], clock=timed, **options)
        assert isinstance(learner.forward.layers, kind) == learner.args.compile_training
        assert all(p.grad is None for p in learner.policy.model.parameters())
        return learner, learner.policy.remarks.get("compiled training")

    return settle


@pytest.mark.parametrize(
    ("seconds", "options", "missing", "taken"),
    [
        # 20 s for each piece of code and 4 s to load; a quarter saved; worth twice what it costs
        (0.1, {"max_steps": 3_519}, 2, False),
        (0.1, {"max_steps": 3_520}, 2, True),
        (0.1, {"max_steps": 1_920}, 1, True),
        (0.1, {"max_steps": 1_919}, 1, False),
        (
            0.1,
            {"max_steps": 880, "num_iterations": 2, "micro_batch_size": 6, "estimator": "grpo"},
            2,
            True,
        ),  # of 12 rows
        (0.1, {"max_steps": 879, "num_iterations": 2, "micro_batch_size": 6, "estimator": "grpo"}, 2, False),
        (0.1, {"max_steps": 99_999}, 0, False),  # nothing fits
    ],
)
def test_updates_must_be_long_enough(seconds, options, missing, taken, trained):
    times = [seconds, *(seconds, seconds / 2) * 3]
    learner, remark = trained(times, layers={"missing": missing}, **options)
    assert learner.args.compile_training is taken
    assert remark == ("measured: a gradient in 0.05 s, 0.1 s without it; ready after 40 s" if taken else None)


@pytest.mark.parametrize(("quick", "taken"), [(0.9, True), (0.92, False)])
def test_layers_that_are_hardly_faster_are_left(quick, taken, trained):
    learner, remark = trained([1.0, *(1.0, quick) * 3], **LONG)
    assert learner.args.compile_training is taken and "1 s without it" in remark


@pytest.mark.parametrize(
    ("layers", "remark"),
    [
        ({"failure": "no compiler"}, "none (no compiler)"),
        ({"made": 0}, "none (no layer keeps keys and values of all tokens, and nothing else)"),
        ({"off": 0.1}, "none (its log-probabilities are off by 0.1"),
        ({"off": float("nan")}, "none (its log-probabilities are off by nan"),
        ({"off": 1e-5}, "as set"),
    ],
)
@pytest.mark.parametrize("asked", [None, True])
def test_wrong_layers_are_told_where_they_were_asked_for(asked, layers, remark, trained):
    learner, found = trained([1.0] + [1.0, 0.5] * 3, layers=layers, compile_training=asked, **LONG)
    assert learner.args.compile_training is (remark == "as set")
    if asked:
        assert found.startswith(remark)
    elif remark != "as set":
        assert found is None


def test_gradients_are_compared_too():
    logprobs, gradient = torch.linspace(-2, -1, 5), [torch.ones(3), torch.zeros(2)]
    same = [x.clone() for x in gradient]
    assert _wrong((logprobs, same), (logprobs, gradient)) == ""
    same[1][0] += 2e-3 * 3**0.5
    assert _wrong((logprobs, same), (logprobs, gradient)) == "its gradients are off by 0.002 of their size"


@pytest.mark.slow
def test_a_run_with_compiled_updates_learns_what_another_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    options = {"max_steps": 4, "prompts_per_step": 4, "num_generations": 4, "cpu": True, "quiet": True}
    options |= {"estimator": "grpo", "num_minibatches": 2, "eval_every": 0}
    metrics = {}
    for asked in (False, True):
        tokenrl.train(
            model=make_policy(initializer_range=0.1),
            task=make_task(),
            output_dir=tmp_path / str(asked),
            compile_training=asked,
            **options,
        )
        lines = (tmp_path / str(asked) / "metrics.jsonl").read_text().splitlines()
        metrics[asked] = [json.loads(line) for line in lines]
    assert json.loads((tmp_path / "True" / "config.json").read_text())["compile_training"] is True
    assert len(list((tmp_path / "cache" / "compiled").glob("*.bin"))) == 2
    for mine, other in zip(metrics[True], metrics[False], strict=True):
        assert mine["reward"] == other["reward"] if "reward" in other else mine.keys() == other.keys()
        if "grad_norm" in other:
            assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_a_run_repeats_what_it_has_compiled_and_samples_what_another_does(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))

    def run(name, steps, **options):
        return tokenrl.train(
            model=make_policy(initializer_range=0.1),
            task=make_task(),
            output_dir=tmp_path / name,
            max_steps=steps,
            prompts_per_step=4,
            num_generations=4,
            cpu=True,
            quiet=True,
            save_every=2,
            eval_every=0,
            **options,
        )

    def lines(name):
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    plain, fast = (run(str(asked), 4, compile_sampling=asked) for asked in (False, True))
    assert len(list((tmp_path / "cache" / "compiled").glob("*.bin"))) == 1
    for mine, other in zip(lines("False"), lines("True"), strict=True):
        assert mine["step"] == other["step"] and mine.get("reward") == other.get("reward")
    for a, b in zip(plain.policy.model.parameters(), fast.policy.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
    config = json.loads((tmp_path / "True" / "config.json").read_text())
    assert config["compile_sampling"] is True
    run("half", 2, compile_sampling=True)
    run("half", 4, resume="auto")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["compile_sampling"] is True
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("half", "True")]
    assert files[0].read_bytes() == files[1].read_bytes()
