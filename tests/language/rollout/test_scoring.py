"""Scoring: the shared prompt, the padding and the slicing of rows change neither values nor gradients."""

import pytest
import torch
from test_head import objective, rollout_of
from tiny_models import (
    ARCHITECTURES,
    PROMPTS,
    alone,
    apart,
    gradient,
    make_policy,
)
from torch.testing import assert_close

from tokenrl.language.policy.model import enable_gradient_checkpointing
from tokenrl.language.rollout.agreement import check_model
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.scoring import Regime, score


@pytest.mark.parametrize("at_once", [None, 3])
@pytest.mark.parametrize(
    "how",
    [{}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9, "min_p": 0.04}],
)
def test_values_and_gradients_are_those_of_the_distribution_that_was_sampled_from(how, at_once):
    policy, how = make_policy("gpt2", dtype="float64"), how | {"temperature": 0.5}
    prompt = policy.encode(PROMPTS[0])
    rollout = rollout_of(policy, prompts=PROMPTS[:1], num_generations=8, **how)
    options = {"distribution": Distribution(**how), "entropy": True}
    scores = score(policy.model, rollout, Regime(tokens_at_once=at_once), **options)
    expected, entropy = alone(policy.model, [prompt], rollout, **how)
    for columns in (scores, rollout):
        assert_close(columns.logprobs[rollout.mask], expected, atol=1e-12, rtol=0)
        assert_close(columns.entropy[rollout.mask], entropy, atol=1e-12, rtol=0)
    expected.sum().backward()
    textbook = gradient(policy.model)
    policy.model.zero_grad()
    scores.logprobs[rollout.mask].sum().backward()
    assert apart(gradient(policy.model), textbook) < 1e-12
    plain = rollout_of(policy, num_generations=0)
    assert torch.equal(
        rollout_of(policy, num_generations=0, **how).completion_ids, plain.completion_ids
    )


def test_a_token_that_was_chosen_keeps_its_probability_where_the_distribution_leaves_it_out():
    """Its own and that of the kept tokens are in the sum, so its log-probability is finite."""
    policy = make_policy("gpt2", dtype="float64")
    rollout = rollout_of(policy, prompts=PROMPTS[:1])  # all tokens are sampled
    whole = score(policy.model, rollout).logprobs[rollout.mask]
    for at_once in (None, 3):
        scores = score(
            policy.model,
            rollout,
            Regime(tokens_at_once=at_once),
            distribution=Distribution(top_k=1),
        )
        logprobs = scores.logprobs[rollout.mask]
        # with the most probable token alone, of probability q: log p / (p + q), or 0 where it was chosen
        assert logprobs.isfinite().all() and (logprobs < -1e-9).any()
        assert (logprobs >= whole - 1e-12).all() and not (logprobs > 0).any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_gives_the_same_gradient(architecture):
    policy = make_policy(architecture)
    rollout = rollout_of(policy)
    expected, values = objective(policy, rollout)
    enable_gradient_checkpointing(policy)
    regime = check_model(policy)
    assert not regime.share_prompt and not regime.remarks
    layers = [m for m in policy.model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert layers[-1].training
    calls = []
    next(layers[-1].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    found, same = objective(policy, rollout, share_prompt=False)
    assert len(calls) == 2  # once forward, once more in the backward pass
    assert_close(same, values, atol=2e-5, rtol=2e-5)
    assert apart(found, expected) < 2e-6
    again = rollout_of(policy)  # sampling uses a cache all the same
    assert torch.equal(again.completion_ids, rollout.completion_ids)
