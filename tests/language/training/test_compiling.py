"""Sampling is compiled where the run is long enough to pay it back, and elsewhere if it is asked for."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from tiny_models import PROMPTS, make_learner, make_policy, make_task

import tokenrl
from tokenrl.language.training import compiling
from tokenrl.language.training.compiling import settle_compilation

ROWS = [{"prompt": p} for p in PROMPTS]


class Step:
    """Stands for compiled code: the model itself, or something that failed."""

    made: list
    failure = ""
    kept = False
    seconds = 12.0

    def __init__(self, directory):
        self.directory = directory
        self.made.append(self)

    def is_kept(self, model, padded):
        assert padded
        return self.kept

    def __call__(self, model, token, cache, places):
        return model(token[:, None], **cache.arguments(places), use_cache=True).logits[:, -1]


@pytest.fixture
def settled(monkeypatch, tmp_path):
    """Settle, with a clock that says that sampling takes these seconds, in turn."""
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path))

    def settle(seconds, *, small=0, estimator="rloo", step=None, processes=1, **options):
        attributes = {"made": [], **(step or {})}
        kind = type("Made", (Step,), attributes)
        monkeypatch.setattr(compiling, "CompiledStep", kind)
        monkeypatch.setattr(compiling, "SMALL", small)
        times = itertools.cycle(seconds)
        monkeypatch.setattr(compiling._Work, "seconds", lambda *_: next(times))
        learner = make_learner(make_policy(), estimator, **options)
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
        # (12 + 3 x 2) s to compile, 4 s to load, a quarter saved; it has to be worth twice what it costs
        (0.1, 1_439, False, False),
        (0.1, 1_440, False, True),
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
    assert f"in {quick:.2g} s, 1 s as they are" in learner.policy.remarks["compiled sampling"]


@pytest.mark.parametrize(
    "options",
    [
        *({"small": 10**9}, {"check": True}, {"processes": 2}, {"estimator": "a2c"}),
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
    assert len(list((tmp_path / "cache" / "compiled").iterdir())) == 1
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
