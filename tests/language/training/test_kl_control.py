"""The KL in training: measured with its error, steered to a target, and free of cost without a weight."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from tiny_models import PROMPTS, apart, gradient, make_learner, make_policy, make_task, one_step

import tokenrl
from tokenrl.core import Estimator
from tokenrl.core.losses import next_beta
from tokenrl.errors import Refused
from tokenrl.language.training import setup
from tokenrl.language.training.batch import StepRows
from tokenrl.language.training.records import completion_kl, step_metrics
from tokenrl.runs.checkpoint import read_state

KL = Estimator.preset("rloo", beta=0.5)


def test_both_estimates_by_hand_with_anything_off_the_mask():
    p = torch.tensor([[0.5, 0.2, 0.9], [0.25, 0.5, 0.1]])
    q = torch.tensor([[0.25, 0.4, 0.3], [0.5, 0.5, 0.7]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    found = completion_kl(p.log(), q.log().masked_fill(~mask, math.nan), mask)
    k1 = [math.log(2) + math.log(0.5), math.log(0.5)]
    k3 = [(0.5 - 1 + math.log(2)) + (2 - 1 + math.log(0.5)), 2 - 1 + math.log(0.5)]
    torch.testing.assert_close(found["kl"], torch.tensor(k1, dtype=torch.double), atol=1e-6, rtol=0)
    torch.testing.assert_close(found["kl_k3"], torch.tensor(k3, dtype=torch.double), atol=1e-6, rtol=0)


def test_a_step_logs_means_over_completions_and_errors_over_prompts():
    draw = torch.Generator().manual_seed(3)
    logprobs, ref = -torch.rand(2, 12, 5, generator=draw).double()
    mask = torch.rand(12, 5, generator=draw) < 0.7

    def kl_metrics(rows, size):
        n = torch.ones(rows, dtype=torch.long)
        found = step_metrics(
            StepRows(
                n.double(),
                n[:, None],
                n > 0,
                n > 1,
                n,
                mask[:rows],
                logprobs[:rows],
                logprobs[:rows],
                ref[:rows],
            ),
            ["one"],
            size,
        )
        return {name: value for name, value in found.items() if name.startswith("kl")}

    found = kl_metrics(12, 3)
    each = ((logprobs - ref) * mask).sum(1)
    assert found["kl"] == pytest.approx(float(each.mean()))
    assert found["kl_stderr"] == pytest.approx(float(each.view(4, 3).mean(1).std() / 2))
    assert found.keys() == {"kl", "kl_stderr", "kl_k3", "kl_k3_stderr"}
    assert kl_metrics(1, 1).keys() == {"kl", "kl_k3"}


def test_the_weight_follows_the_measured_kl_and_the_next_step_uses_it():
    settings = {"dtype": "float64"}
    learner = make_learner(make_policy("gpt2", **settings), KL, target_kl=0.3, kl_gain=2.0)
    beta, seen = 0.5, []
    for step in (1, 2, 3, 4):
        metrics = one_step(learner, step=step).metrics
        assert metrics["kl_coef"] == pytest.approx(beta)
        beta = next_beta(beta, metrics["kl"], target=0.3, gain=2.0)
        seen.append(metrics["kl_coef"])
    assert seen[1] < 0.5 < max(seen[2:]) * 2 and len(set(seen)) == 4  # down from 0, up when beyond the target
    assert learner.args.estimator.beta == 0.5  # the run's settings keep the start
    first, second = (make_learner(make_policy("gpt2", **settings), KL, target_kl=t) for t in (0.3, None))
    for one in (first, second):
        one_step(one)
    second.estimator = dataclasses.replace(KL, beta=0.5 * (1 - 0.02))  # from a KL of 0, by the gain 0.1
    slopes = []
    for one in (first, second):
        one_step(one, step=2)
        slopes.append(gradient(one.model))
    assert apart(*slopes) < 1e-12
    assert first.estimator.beta == pytest.approx(second.estimator.beta, rel=0.03)


def test_without_a_target_the_weight_stays():
    learner = make_learner(make_policy(), KL)
    assert [one_step(learner, step=step).metrics["kl_coef"] for step in (1, 2)] == [0.5, 0.5]


def forwards(estimator: Estimator, lora_r: int = 0) -> tuple[int, int]:
    """Forward passes of the trained model and of a reference in one step; -1 where there is no reference."""
    policy, counts = make_policy(), {}
    if lora_r:
        from tokenrl.language.policy.lora import add_lora

        add_lora(policy, r=lora_r, alpha=None, target_modules=(), seed=0)
    learner = make_learner(policy, estimator)
    for name, model in (("policy", policy.model), ("reference", policy.reference)):
        counts[name] = -1 if model is None else 0
        if model is not None:
            model.register_forward_hook(
                lambda *_, name=name: counts.__setitem__(name, counts[name] + 1), always_call=True
            )
    metrics = one_step(learner).metrics
    assert ("kl" in metrics) == ("kl_coef" in metrics) == estimator.needs_kl
    return counts["policy"], counts["reference"]


def test_without_a_weight_no_reference_is_held_or_run():
    without, none = forwards(Estimator.preset("rloo"))
    same, reference = forwards(KL)
    assert none == -1 and reference > 0 and same == without
    assert forwards(Estimator.preset("rloo"), lora_r=2)[0] == without
    more, none = forwards(KL, lora_r=2)  # the reference is the model with its adapter off
    assert none == -1 and more == without + reference


@pytest.mark.parametrize(
    ("estimator", "settings", "words"),
    [
        (Estimator(), {"target_kl": 2.0}, "has beta 0.*--estimator.beta"),
        (KL, {"target_kl": 0.0}, "target_kl was given as 0.0"),
        (KL, {"target_kl": float("nan")}, "target_kl was given as nan"),
        (KL, {"target_kl": 1.0, "kl_gain": 0.0}, "kl_gain was given as 0.0"),
        (KL, {"target_kl": 1.0, "kl_gain": 5.0}, "kl_gain was given as 5.0"),
    ],
)
def test_a_target_that_cannot_be_held_is_refused(estimator, settings, words, tmp_path):
    with pytest.raises(Refused, match=words):
        setup.resolve(setup.TrainArguments(estimator=estimator, **settings), make_task())
    with pytest.raises(Refused, match=words):
        tokenrl.train(
            model=(make_policy().model, make_policy().tokenizer),
            task=make_task(),
            output_dir=tmp_path / "run",
            estimator=estimator,
            max_completion_length=6,
            **settings,
        )
    assert not (tmp_path / "run").exists()


def trained(directory, estimator, **options):
    """The steps' metrics of a run of the tiny model, and its configuration."""
    policy = make_policy()
    tokenrl.train(
        model=(policy.model, policy.tokenizer),
        task=make_task(PROMPTS * 2),
        output_dir=directory,
        estimator=estimator,
        prompts_per_step=8,
        num_generations=4,
        max_completion_length=6,
        learning_rate=2e-3,
        eval_every=0,
        eval_generations=0,
        quiet=True,
        cpu=True,
        **options,
    )
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return rows[1:], json.loads((directory / "config.json").read_text())


def test_a_run_logs_the_weight_and_keeps_the_one_it_started_from(tmp_path):
    rows, config = trained(tmp_path / "run", KL, target_kl=1.0, max_steps=3, save_every=2)
    state = read_state(tmp_path / "run/checkpoints/step_000002")
    assert state["learner"]["kl_coef"] == rows[2]["kl_coef"] != 0.5  # what the step after the checkpoint uses
    assert [row["kl_coef"] for row in rows][:2] == [0.5, pytest.approx(0.5 * 0.98)]
    assert all(row["kl_stderr"] > 0 for row in rows[1:])
    assert (config["estimator"]["beta"], config["target_kl"], config["kl_gain"]) == (0.5, 1.0, 0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("placement", "kind"), [("reward", "k1"), ("loss", "full_path")])
def test_a_target_holds_the_policy_near_its_reference(placement, kind, tmp_path):
    """From a weight that lets the KL go to 5 and beyond; means over the last steps."""
    estimator = Estimator.preset("rloo", beta=0.3, kl_placement=placement, kl_estimator=kind)
    ends = {}
    for target in (1.0, None):
        options = {"target_kl": target, "kl_gain": 0.5, "max_steps": 60}
        rows, _ = trained(tmp_path / str(target), estimator, **options)
        ends[target] = sum(row["kl_k3"] for row in rows[-8:]) / 8
        assert (rows[-1]["kl_coef"] > 1) == (target is not None)
    assert 0.5 < ends[1.0] < 2.5 and ends[None] > 4.0
