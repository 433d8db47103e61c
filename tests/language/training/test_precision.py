"""The bfloat16 copy of the weights, the attention of updates, and how both are chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refusals import refused
from tiny_models import (
    apart,
    completions,
    gradient,
    make_learner,
    make_policy,
    make_task,
    one_step,
    vowel_reward,
    weights,
)

from tokenrl.core.estimator import Estimator
from tokenrl.language.policy.model import add_lora
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout import forward
from tokenrl.language.rollout.forward import Forward, half_copy
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.rows import collect_rows

KL = Estimator.preset("grpo", beta=0.1)


def sampled(policy):
    return completions(policy, [[3, 4, 5], [2, 7, 9]], num_generations=3, max_completion_length=5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_of_the_copy_reach_the_weights_in_float32(architecture):
    policy = make_policy(architecture, initializer_range=0.1)
    rollout = sampled(policy)
    score(policy.model, rollout).logprobs.sum().backward()
    exact = gradient(policy.model)
    policy.model.zero_grad()
    copied, copies = half_copy(policy)
    half = Forward(policy=copied, model=copied.model, copies=copies)
    for _ in range(2):  # a second backward pass adds to the first
        score(half.policy.model, rollout).logprobs.sum().backward()
        half.accumulate_gradients()
    assert all(p.grad is None for p in half.policy.model.parameters())
    assert {p.grad.dtype for p in policy.trainable_parameters()} == {torch.float32}
    assert 0 < apart(gradient(policy.model) / 2, exact) < 0.05


def test_the_copy_follows_the_weights_after_each_update():
    learner = make_learner(make_policy(), "grpo", mixed_precision="bf16", num_minibatches=2)
    before = weights(learner.policy.model)
    one_step(learner)
    after = weights(learner.policy.model)
    assert not torch.equal(before, after)
    assert not torch.equal(after, after.bfloat16().double())  # updates are added in float32
    assert torch.equal(weights(learner.forward.policy.model), after.bfloat16().double())


def test_sampling_and_training_see_the_same_policy_and_its_reference():
    learner = make_learner(make_policy(), KL, mixed_precision="bf16")
    prompts = list(enumerate(make_task().train_prompts))
    sampling = replace(learner.sampling, step=1)
    rollout = collect_rows(learner, Rewards(vowel_reward), prompts, sampling)
    with torch.no_grad():
        same, exact = (
            score(model, rollout).logprobs[rollout.mask]
            for model in (learner.forward.model, make_policy().model)
        )
    off = [float((x - rollout.logprobs[rollout.mask]).abs().mean()) for x in (same, exact)]
    assert off[0] < 0.5 * off[1]
    assert one_step(learner).metrics["kl"] == pytest.approx(0, abs=1e-6)


def test_a_frozen_base_is_kept_once():
    policy = make_policy()
    add_lora(policy, r=2)
    learner = make_learner(policy, "rloo", mixed_precision="bf16")
    one_step(learner)
    pairs = zip(policy.model.parameters(), learner.forward.policy.model.parameters(), strict=True)
    for mine, own in pairs:
        assert own.dtype == torch.bfloat16
        assert (mine.data_ptr() == own.data_ptr()) == (not mine.requires_grad)
        assert mine.dtype == (torch.float32 if mine.requires_grad else torch.bfloat16)
    # what a run returns can be used
    assert policy.model(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("parameters", "device", "multiplies", "options", "precision", "attention"),
    [
        (10**7 - 1, "cpu", True, {}, "no", "as_loaded"),
        (10**5, "cpu", False, {"training_attention": "eager"}, "no", "eager"),
        (10**7, "cpu", False, {}, "no", "eager"),
        (10**7, "cpu", False, {"max_completion_length": 129}, "no", "as_loaded"),
        (10**7, "cpu", True, {}, "bf16", "eager"),
        (10**7, "cpu", True, {"mixed_precision": "no"}, "no", "eager"),
        (10**7, "cuda", False, {}, "bf16", "as_loaded"),
    ],
)
def test_how_a_run_computes_follows_from_rules(
    parameters, device, multiplies, options, precision, attention, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    kinds = {"avx512_bf16": multiplies, "amx_bf16": False}  # how a processor multiplies
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: kinds, raising=False)
    args = TrainArguments(**{"max_completion_length": 6} | options)
    trained, place = make_policy().trainable_parameters(), torch.device(device)
    assert forward.choose_precision(args, trained, parameters, place)[0] == precision
    length = args.max_completion_length
    assert forward._attention(args, parameters, place, length) == attention


def test_a_model_is_checked_in_float32_before_its_weights_are_rounded(monkeypatch):
    """On a model that is sure of its answers bfloat16 rounded a gradient until it had nothing of itself."""
    checked, real = [], forward.check_model

    def noted(policy, model, **settings):
        checked.extend(p.dtype for p in (*policy.model.parameters(), *model.parameters()))
        return real(policy, model, **settings)

    monkeypatch.setattr(forward, "check_model", noted)
    learner = make_learner(make_policy(), mixed_precision="bf16")
    assert {*checked} == {torch.float32}
    assert {p.dtype for p in learner.forward.model.parameters()} == {torch.bfloat16}


def test_attention_of_another_kind_is_left_where_a_model_has_none_and_refused_if_asked_for(
    monkeypatch,
):
    monkeypatch.setattr(forward, "LARGE", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # in float32
    assert make_learner(make_policy(), "rloo").args.training_attention == "eager"
    policy = make_policy()
    policy.model.set_attn_implementation = lambda name: 1 / 0
    assert make_learner(policy, "rloo").args.training_attention == "as_loaded"
    with refused("'eager' does not work with this model"):
        make_learner(policy, "rloo", training_attention="eager")
