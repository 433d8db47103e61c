"""The KL in training: measured with its error, steered to a target, and free of cost without a weight."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tiny_models import apart, gradient, make_learner, make_policy, one_step

from tokenrl.core import Estimator
from tokenrl.core.losses import next_beta
from tokenrl.language.policy.lora import add_lora
from tokenrl.language.training.batch import StepRows
from tokenrl.language.training.collect import step_metrics

KL = Estimator.preset("rloo", beta=0.5)


def test_a_step_logs_means_over_completions_and_errors_over_prompts():
    draw = torch.Generator().manual_seed(3)
    logprobs, ref = -torch.rand(2, 12, 5, generator=draw).double()
    mask = torch.rand(12, 5, generator=draw) < 0.7

    held = ref.masked_fill(~mask, math.nan)  # off the mask it may hold anything

    def kl_metrics(count, size):
        n, own = torch.ones(count, dtype=torch.long), logprobs[:count]
        rows = StepRows(n.double(), n[:, None], n > 0, n > 1, n, mask[:count], own, own, held[:count])
        found = step_metrics(rows, ["one"], size)
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


@pytest.mark.parametrize("lora_r", [0, 2])
def test_without_a_weight_no_reference_is_held_or_run(lora_r, monkeypatch):
    policy = make_policy()
    if lora_r:
        add_lora(policy, r=lora_r)
    monkeypatch.setattr(type(policy), "reference_model", lambda self: pytest.fail("it was run"))
    metrics = one_step(make_learner(policy, "rloo")).metrics
    assert policy.reference is None and not {"kl", "kl_coef"} & metrics.keys()
