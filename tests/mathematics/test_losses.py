"""Weights and losses: aggregation, clipping, sums over slices, and nothing leaking from masked positions."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from drawing import normals, seeded
from refusals import refused
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.core.divergences import LEAST_BETA, k3, next_beta
from tokenrl.core.losses import token_entropy
from tokenrl.core.presets import PRESETS
from tokenrl.core.statistics import generator_of, mean_and_error
from tokenrl.lab import tabular_problem

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).double()
KL = {"beta": 0.3, "kl_placement": "loss", "kl_baseline": "none"}
FULL = {**KL, "kl_estimator": "k3", "entropy_coef": 0.1}
CLOSED = {**KL, "kl_estimator": "closed_form_path"}
PATHS = {
    **KL,
    "kl_estimator": "full_path",
    "entropy_coef": 0.1,
    "importance": "token",
    "importance_cap": 1.5,
}


def inputs(seed=0, n=4, t=4, dtype=torch.double):
    """Every tensor that a loss may need."""
    draw = seeded(seed)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "entropy", "token_kl")
    return {name: torch.randn(n, t, generator=draw, dtype=dtype) / 3 for name in names}


@pytest.mark.parametrize(
    ("aggregation", "divisors", "without_first"),
    [
        ("sequence_sum", [4, 4, 4, 4], [1, 3, 3, 3]),
        ("sequence_mean", [8, 12, 1, 4], [1, 9, 1, 3]),
        ("token_mean", [6, 6, 6, 6], [1, 4, 4, 4]),
        ("fixed_length", [40, 40, 40, 40], [1, 30, 30, 30]),
    ],
)
def test_weights_by_hand(aggregation, divisors, without_first):
    """The row without any action is one of the N = 4; a row that abstains counts nowhere."""
    weights_of = partial(Estimator(aggregation=aggregation).token_weights, max_length=10)
    assert_close(weights_of(MASK), MASK / torch.tensor(divisors)[:, None])
    valid = torch.tensor([False, True, True, True])
    wanted = MASK * valid[:, None] / torch.tensor(without_first)[:, None]
    assert_close(weights_of(MASK.bool(), valid=valid), wanted.float())
    assert not weights_of(MASK, valid=valid & False).any()
    assert not weights_of(MASK * 0).any()


def gradient(e, tensors, advantages, weights, mask):
    """Loss and gradient to the logprobs."""
    tensors = tensors | {"logprobs": tensors["logprobs"].clone().requires_grad_()}
    loss = e.loss(advantages=advantages, weights=weights, mask=mask, **tensors)
    return loss.detach(), torch.autograd.grad(loss, tensors["logprobs"])[0]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("terms", [FULL, CLOSED, PATHS | {"kl_estimator": "k2_sequence"}])
def test_nothing_leaks_from_masked_positions(name, terms):
    e, tensors = Estimator.preset(name, **terms), inputs()
    tensors["sampling_logprobs"] = tensors["old_logprobs"] + tensors["entropy"]
    advantages, mask = torch.tensor([0.5, -2.0, 1.0, 3.0]), MASK
    weights = e.token_weights(mask, max_length=9)
    clean = gradient(e, tensors, advantages, weights, mask)
    for spoil in (torch.nan, torch.inf):
        spoiled = {k: x.masked_fill(mask == 0, spoil) for k, x in tensors.items()}
        dirty = gradient(e, spoiled, advantages, weights.masked_fill(mask == 0, spoil), mask)
        for a, b in zip(clean, dirty, strict=True):
            assert torch.equal(a, b)
        # a row of zero weight may hold anything too
        without = weights.clone()
        without[0] = 0
        spoiled["logprobs"][0] = spoil
        assert gradient(e, spoiled, advantages, without, mask)[1].isfinite().all()


def test_the_error_of_a_mean_is_that_of_independent_groups():
    """All 16 steps of two groups of two, drawn from two prompts of equal completions: E error^2 = Var."""
    draws = itertools.product((0.0, 3.0), (1.0, -1.0), (0.0, 3.0), (1.0, -1.0))
    rows = torch.tensor([[a + b, a, c + d, c] for a, b, c, d in draws], dtype=torch.double)
    squares = torch.stack([mean_and_error(x, 2)[1] ** 2 for x in rows])
    assert float(squares.mean()) == pytest.approx(float(rows.mean(-1).var(correction=0)), rel=1e-12)
    # rows of a group are not independent
    alone = torch.stack([mean_and_error(x, 1)[1] ** 2 for x in rows])
    assert alone.mean() < 0.8 * squares.mean()


def test_generators_differ_by_seed_purpose_and_number_and_repeat():
    def draw(*key) -> int:
        return int(torch.randint(2**62, (), generator=generator_of(*key)))

    keys = list(itertools.product((0, 1, 2**31, 2**32 - 1), ("probe", "minibatches"), range(50)))
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(3, "probe", 7) == draw(3, "probe", 7)


def run(ratios, advantage, *, mask=None, **fields):
    """Loss and gradient [T] of one row in the log-ratios, with weights of 1."""
    logprobs = torch.tensor([ratios], dtype=torch.double).log().requires_grad_()
    one = torch.ones_like(logprobs) if mask is None else mask
    e, old = Estimator(baseline="none", **fields), torch.zeros_like(logprobs)
    loss = e.loss(logprobs, torch.tensor([advantage]), one, one, old_logprobs=old)
    return loss.item(), torch.autograd.grad(loss, logprobs)[0][0].tolist()


def clipped_logs(logs, a):
    return logs.clamp(max=math.log(1.3)) if a > 0 else logs.clamp(min=math.log(0.8))


def clipped_mean(logs, a):
    """The weight of each of the tokens is 1 here, and 1/L with the aggregation 'sequence_mean'."""
    ratio = logs.mean().exp()
    return len(logs) * torch.minimum(ratio * a, ratio.clamp(0.8, 1.3) * a)


GAINS = {
    "token": lambda logs, a: torch.minimum(logs.exp() * a, logs.exp().clamp(0.8, 1.3) * a).sum(),
    "none": lambda logs, a: a * logs.sum(),
    "cispo": lambda logs, a: a * logs.detach().exp().clamp(0.8, 1.3) @ logs,
    "sequence_mean": clipped_mean,
    "sequence_product": lambda logs, a: a * logs.sum().exp(),
    "geometric_clip": lambda logs, a: len(logs) * a * clipped_logs(logs, a).mean().exp(),
}


@pytest.mark.parametrize("advantage", [2.0, -3.0])
@pytest.mark.parametrize("ratios", [[1.1, 1.3], [0.5, 0.79, 1.0, 1.19, 1.4, 3.0], [2.0, 3.0]])
@pytest.mark.parametrize("ratio", GAINS)
def test_the_gradient_of_a_ratio_is_that_of_its_formula(ratio, ratios, advantage):
    """By automatic differentiation in the log-ratios; a position that is no action counts nowhere."""
    logs = torch.tensor(ratios, dtype=torch.double).log().requires_grad_()
    wanted = -torch.autograd.grad(GAINS[ratio](logs, advantage), logs)[0]
    mask = torch.tensor([[1.0] * len(ratios) + [0.0]], dtype=torch.double)
    axes = {"ratio": ratio, "epsilon": 0.2, "epsilon_high": 0.3}
    _, slopes = run([*ratios, torch.nan], advantage, mask=mask, **axes)
    assert slopes == pytest.approx([*wanted.tolist(), 0.0], abs=1e-12)


def test_the_dual_clip_and_bounds_that_are_left_out():
    value, slopes = run([2.0, 4.0], -1.0, ratio="token", dual_clip=3.0)
    assert value == pytest.approx(2 + 3) and slopes == pytest.approx([2.0, 0.0])
    assert run([2.0, 4.0], -1.0, ratio="token")[1] == pytest.approx([2.0, 4.0])
    assert run([2.0, 4.0], 1.0, ratio="token", dual_clip=3.0) == run([2.0, 4.0], 1.0, ratio="token")
    # without epsilon_high the bounds are 1 - epsilon and 1 + epsilon
    assert run([1.3, 1.1], 1.0, ratio="token", epsilon=0.2)[1] == pytest.approx([0.0, -1.1])
    fields = {"ratio": "geometric_clip", "epsilon": 1.0}  # a lower bound of 0 is none
    assert run([1.1, 0.5], 2.0, **fields)[1] == pytest.approx([-2 * 0.55**0.5] * 2)


@pytest.mark.parametrize("advantage", [2.0, -3.0])
def test_trust_drops_tokens_whose_probability_has_moved_too_far(advantage):
    """The bound is on the probability: 0.02 may grow tenfold and more, where a ratio would be clipped."""
    before = torch.tensor([[0.02, 0.02, 0.5, 0.5, 0.5, 0.9]], dtype=torch.double)
    logprobs = torch.tensor([[0.001, 0.21, 0.69, 0.71, 0.29, 0.9]], dtype=torch.double).log()
    axes = {"ratio": "trust", "trust_bound": 0.2, "trust_cap": 4.0}
    inputs = (torch.tensor([advantage]), torch.ones(1, 6), torch.ones(1, 6))
    logprobs.requires_grad_()
    loss = Estimator(**axes).loss(logprobs, *inputs, old_logprobs=before.log())
    weights = [0.05, 4.0, 1.38, 1.42, 0.58, 1.0]
    weights[3 if advantage > 0 else 4] = 0.0
    slopes = torch.autograd.grad(loss, logprobs)[0][0].tolist()
    assert slopes == pytest.approx([-advantage * weight for weight in weights])


@pytest.mark.parametrize(
    ("value_clip", "errors", "slopes"),
    [
        (None, [1.0, 1.0, 1.0], [-1.0, 1.0, -1.0]),
        # of 1.0 and its clipped 0.5 the clipped is further off, of 1.0 and its clipped 2.5 the value itself
        (0.5, [1.5, 1.0, 1.0], [0.0, 1.0, -1.0]),
    ],
)
def test_the_loss_of_a_critic(value_clip, errors, slopes):
    weights = torch.tensor([0.5, 0.25, 1.0])
    values = torch.tensor([[1.0, 3.0, 1.0, torch.nan]], requires_grad=True)
    returns = torch.tensor([[2.0, 2.0, 2.0, torch.inf]], requires_grad=True)
    inputs = {"old_values": torch.tensor([[0.0, 2.9, 3.0, torch.nan]])}
    e, padded = Estimator(value_clip=value_clip), torch.tensor([[*weights, 0.0]])
    loss = e.critic_loss(values, returns, padded, **inputs)
    assert loss.item() == pytest.approx(float(weights @ torch.tensor(errors).square()) / 2)
    loss.backward()
    assert values.grad.tolist() == [[*(weights * torch.tensor(slopes)).tolist(), 0.0]]
    assert returns.grad is None
    with refused("old_values"):
        Estimator(value_clip=0.5).critic_loss(values, returns, padded)


def test_k3_keeps_its_digits_near_the_reference():
    """Its mean is that of `test_expectations.py`; exp(-l) - 1 + l would lose every digit here."""
    logprobs = tabular_problem(30).logprobs[0]
    near = k3(logprobs, logprobs + 1e-9)
    assert_close(near, torch.full_like(logprobs, 5e-19), rtol=1e-6, atol=0)


def test_entropy_of_a_token():
    x = normals(seeded(0), 5, 7)
    assert_close(token_entropy(x), torch.distributions.Categorical(logits=x).entropy())
    assert torch.autograd.gradcheck(token_entropy, x.requires_grad_())
    half = torch.tensor([0.0, 0.0, -torch.inf], requires_grad=True)
    entropy = token_entropy(half)
    (1e9 * entropy).backward()  # a large weight in the loss
    assert entropy.item() == pytest.approx(math.log(2)) and half.grad.isfinite().all()


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (6.0, 0.5),
        (6.6, 0.505),
        (5.4, 0.495),
        (60.0, 0.51),
        (-3.0, 0.49),
        (math.inf, 0.51),
        (math.nan, 0.5),
    ],
)
def test_beta_moves_by_the_formula(kl, wanted):
    """K = 0.1, target 6: the relative error, at most a fifth either way, times a tenth; never to 0."""
    assert next_beta(0.5, kl, target=6.0) == pytest.approx(wanted, abs=1e-12)
    assert next_beta(LEAST_BETA, 0.0, target=6.0) == LEAST_BETA
