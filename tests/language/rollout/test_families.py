"""Many architectures against a forward pass of each row alone, and how `check_model` scores them."""

import pytest
import torch
from families import FAMILIES, family_policy
from refusals import refused
from tiny_models import alone, apart, quickly
from torch.testing import assert_close

from tokenrl.language.rollout.agreement import check_model
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Regime, score

PROMPTS = [[5, 9, 13, 21, 33], [40, 7], [3, 4, 5]]
REFUSED = {"recurrent_gemma"}
NOT_SHARED = {"mamba": "log-probabilities"}  # it forgets its state where several tokens follow
WHOLE_LOGITS = {"gemma2"}  # they come after more than a product
RIGHT = sorted(set(FAMILIES) - REFUSED)
LONG = {"mamba2", "granite_hybrid", "qwen3_next"}
"""Families that take longest, of which the quick tests have relatives: falcon_h1, lfm2 and qwen3_5."""


def sampled(policy, length):
    """Nine completions of three prompts of unequal lengths, which end at several lengths."""
    draws = torch.rand(9, length, generator=torch.Generator().manual_seed(1))
    policy.eos_ids = tuple(range(0, 64, 7))
    return TransformersGenerator(policy).generate(PROMPTS, Sampling(length, 3), draws)


def slope(logprobs, model):
    """Gradient of a weighted sum of log-probabilities in all weights, as one vector."""
    weights = torch.cos(torch.arange(logprobs.numel())).view_as(logprobs)
    found = torch.autograd.grad(
        (logprobs * weights).sum(), list(model.parameters()), allow_unused=True
    )
    pairs = zip(found, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs])


# A single token may take other kernels than several.
@pytest.mark.parametrize("length", quickly([1, 6], [1]))
@pytest.mark.parametrize("family", quickly(RIGHT, LONG))
def test_each_family_is_scored_in_the_fastest_way_that_is_that_of_each_row_alone(family, length):
    policy = family_policy(family)
    before = torch.get_rng_state()
    regime = check_model(policy, hidden=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in policy.model.parameters())
    assert regime.share_prompt == (family not in NOT_SHARED) == ("prompts" not in regime.remarks)
    assert NOT_SHARED.get(family, "") in regime.remarks.get("prompts", "")
    assert (
        (regime.tokens_at_once is None) == (family in WHOLE_LOGITS) == ("logits" in regime.remarks)
    )

    rollout = sampled(policy, length)
    # rows leave the batch one by one
    assert length < 6 or len(set(rollout.mask.sum(1).tolist())) > 2
    expected, _ = alone(policy.model, PROMPTS, rollout)
    assert_close(rollout.logprobs[rollout.mask], expected.detach(), atol=2e-5, rtol=0)
    gradient = slope(expected, policy.model)
    for share in {False, regime.share_prompt}:
        found = score(policy.model, rollout, Regime(share)).logprobs[rollout.mask]
        assert_close(found.detach(), expected.detach(), atol=2e-5, rtol=0)
        assert apart(slope(found, policy.model), gradient) < 2e-5


@pytest.mark.parametrize(
    "family", quickly(RIGHT, set(RIGHT) - {"mixtral", "gemma3", "qwen3_5", "mamba"})
)
def test_bfloat16_is_not_mistaken_for_an_error(family):
    policy = family_policy(family, dtype="bfloat16")
    assert check_model(policy, hidden=True).share_prompt or family in NOT_SHARED


def test_a_model_that_keeps_its_states_to_itself_is_refused():
    with refused(r"recurrent_gemma.* returns no cache"):
        check_model(family_policy("recurrent_gemma"))
