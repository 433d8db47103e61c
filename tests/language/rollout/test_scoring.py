"""Scoring: the shared prompt, the padding and the slicing of rows change neither values nor gradients."""

import dataclasses

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    ENDS,
    PROMPTS,
    apart,
    completions,
    gradient,
    make_policy,
    textbook_logprobs,
)

from tokenrl.language.policy.model import enable_gradient_checkpointing
from tokenrl.language.rollout.agreement import check_model
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.scoring import Regime, score


def rollout_of(policy, prompts=PROMPTS, generations=3, length=6, **how):
    policy.eos_ids = ENDS
    how |= {"num_generations": generations, "max_completion_length": length}
    return completions(policy, [policy.encode(p) for p in prompts], seed=1, **how)


def objective(policy, rollout, share_prompt=True):
    """A weighted sum of logprobs and entropies over the mask, and its gradient."""
    policy.model.zero_grad()
    scores = score(policy.model, rollout, Regime(share_prompt), entropy=True)
    weights = torch.linspace(-1, 2, len(rollout.mask), dtype=scores.logprobs.dtype)[:, None]
    total = scores.logprobs * weights + 0.1 * scores.entropy
    value = torch.where(rollout.mask, total, 0).sum()
    value.backward()
    return value.item(), gradient(policy.model)


def test_what_stands_behind_the_mask_changes_nothing():
    policy = make_policy()
    rollout = rollout_of(policy)
    value, expected = objective(policy, rollout)
    ids = torch.where(rollout.mask, rollout.completion_ids, 77)
    assert not torch.equal(ids, rollout.completion_ids)
    same, found = objective(policy, dataclasses.replace(rollout, completion_ids=ids))
    assert same == pytest.approx(value, rel=1e-6) and apart(found, expected) < 1e-6


@pytest.mark.parametrize("at_once", [None, 3])
@pytest.mark.parametrize(
    "how",
    [{}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 20, "top_p": 0.9, "min_p": 0.04}],
)
def test_values_and_gradients_are_those_of_the_distribution_that_was_sampled_from(how, at_once):
    policy, how = make_policy("gpt2", dtype="float64"), how | {"temperature": 0.5}
    rollout = rollout_of(policy, prompts=PROMPTS[:1], generations=8, **how)
    scores = score(
        policy.model, rollout, Regime(tokens_at_once=at_once), distribution=Distribution(**how)
    )
    prompt = policy.encode(PROMPTS[0])
    total = torch.zeros(())
    for row, mask in enumerate(rollout.mask):
        ids = torch.tensor([prompt + rollout.completion_ids[row][mask].tolist()])
        logp = textbook_logprobs(policy.model(ids).logits[0, len(prompt) - 1 : -1], **how)
        assert (len(how) > 1) == bool(logp.isinf().any())
        expected = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(scores.logprobs[row][mask], expected, atol=1e-12, rtol=0)
        total = total + expected.sum()
    total.backward()
    textbook = gradient(policy.model)
    policy.model.zero_grad()
    scores.logprobs[rollout.mask].sum().backward()
    assert apart(gradient(policy.model), textbook) < 1e-12


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
    value, expected = objective(policy, rollout)
    enable_gradient_checkpointing(policy)
    layers = [
        m
        for m in policy.model.modules()
        if getattr(m, "gradient_checkpointing", False) and m.training
    ]
    assert layers and not check_model(policy).share_prompt
    calls = []
    next(layers[-1].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    same, found = objective(policy, rollout, share_prompt=False)
    assert len(calls) == 2  # once forward, once more in the backward pass
    assert same == pytest.approx(value, rel=2e-6) and apart(found, expected) < 2e-6
    again = rollout_of(policy)  # sampling uses a cache all the same
    assert torch.equal(again.completion_ids, rollout.completion_ids)
