"""Presets of toolkits have the gradient of a loss that is written from the toolkit's own formulas."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from tokenrl.core import Estimator

GROUPS, SIZE, LENGTH = 3, 4, 5
MASK = torch.arange(LENGTH) < torch.tensor([[1], [5], [3], [2]]).repeat(GROUPS, 1)


def tokens(seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(4, GROUPS * SIZE, LENGTH, generator=draw, dtype=torch.double) * 0.3 - 2


def standardised(rewards):
    grouped = rewards.view(GROUPS, SIZE)
    centred = grouped - grouped.mean(1, keepdim=True)
    return (centred / (grouped.std(1, keepdim=True) + 1e-6)).view(-1, 1)


def clipped(logprobs, old, advantages):
    ratio = (logprobs - old).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)


def tinker(logprobs, old, sampling, ref, rewards):
    """Importance sampling: minus the sum of the ratio to the sampler, times a centred reward."""
    grouped = rewards.view(GROUPS, SIZE)
    advantages = (grouped - grouped.mean(1, keepdim=True)).view(-1, 1)
    # the mean over rows in place of the sum, as preset.beyond says
    return -((logprobs - sampling).exp() * advantages * MASK).sum() / len(rewards)


def skyrl(logprobs, old, sampling, ref, rewards):
    """PPO's clip and k3, both as means over all tokens, as preset.beyond says."""
    k3 = (ref - logprobs).exp() - (ref - logprobs) - 1
    losses = clipped(logprobs, old, standardised(rewards)) + 0.001 * k3
    return (losses * MASK).sum() / MASK.sum()


def slime(logprobs, old, sampling, ref, rewards):
    """PPO's clip, as a mean over the tokens of each completion, then over completions."""
    losses = clipped(logprobs, old, standardised(rewards)) * MASK
    return (losses.sum(1) / MASK.sum(1)).mean()


@pytest.mark.parametrize("loss", [tinker, skyrl, slime], ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_toolkits_loss_has_the_gradient_of_its_preset(loss, is_first):
    """Also in a later update, and with a sampler that is not the policy."""
    estimator = Estimator.preset(loss.__name__)
    logprobs, change, gap, ref = tokens(3)
    old = logprobs if is_first else logprobs + 0.1 * (change + 2)
    sampling = old + 0.05 * (gap + 2)
    rewards = torch.randn(GROUPS * SIZE, generator=torch.Generator().manual_seed(1)).double()
    inputs = {"mask": MASK, "old_logprobs": old, "sampling_logprobs": sampling, "ref_logprobs": ref}
    advantages = estimator.advantages(
        rewards, MASK, group_size=SIZE, logprobs=old, ref_logprobs=ref
    )
    weights = estimator.token_weights(MASK, max_length=LENGTH)
    gradients = []
    for compute in (
        lambda x: estimator.loss(x, advantages.policy, weights, **inputs),
        lambda x: loss(x, old, sampling, ref, rewards),
    ):
        variable = logprobs.clone().requires_grad_()
        gradients += torch.autograd.grad(compute(variable), variable)
    assert_close(gradients[0], gradients[1] * MASK)
