"""Weights and losses: aggregation, clipping, sums over slices, and nothing leaking from masked positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tokenrl.core import Estimator
from tokenrl.core.choices import AXES
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Refused

MASK = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).double()
FULL = {"beta": 0.3, "kl_placement": "loss", "kl_estimator": "k3", "entropy_coef": 0.1}
PATHS = {
    "beta": 0.3,
    "kl_placement": "loss",
    "kl_estimator": "full_path",
    "entropy_coef": 0.1,
    "entropy_form": "sequence",
    "importance_cap": 1.5,
}


def inputs(seed=0, n=4, t=4, dtype=torch.double):
    """Every tensor that a loss may need."""
    draw = torch.Generator().manual_seed(seed)
    names = ("logprobs", "old_logprobs", "ref_logprobs", "entropy")
    return {name: torch.randn(n, t, generator=draw, dtype=dtype) / 3 for name in names}


@pytest.mark.parametrize(
    ("aggregation", "divisors"),
    [
        ("sequence_sum", [4, 4, 4, 4]),
        ("sequence_mean", [8, 12, 1, 4]),
        ("token_mean", [6, 6, 6, 6]),
        ("fixed_length", [40, 40, 40, 40]),
    ],
)
def test_weights_by_hand(aggregation, divisors) -> None:
    """The row without any action is one of the N = 4."""
    e = Estimator(aggregation=aggregation)
    wanted = MASK / torch.tensor(divisors)[:, None]
    torch.testing.assert_close(e.token_weights(MASK, max_length=10), wanted)
    torch.testing.assert_close(e.token_weights(MASK.bool(), max_length=10), wanted.float())


@pytest.mark.parametrize("aggregation", AXES["aggregation"])
def test_weights_of_abstaining_rows(aggregation) -> None:
    e = Estimator(aggregation=aggregation)
    for gone in range(4):
        valid = torch.arange(4) != gone
        got = e.token_weights(MASK, max_length=10, valid=valid)
        torch.testing.assert_close(got[valid], e.token_weights(MASK[valid], max_length=10))
        assert (got[gone] == 0).all()
    assert (e.token_weights(MASK, max_length=10, valid=torch.zeros(4)) == 0).all()
    assert (e.token_weights(MASK * 0, max_length=10) == 0).all()


def test_padding_changes_no_weight() -> None:
    for aggregation in AXES["aggregation"]:
        e = Estimator(aggregation=aggregation)
        wide = e.token_weights(torch.nn.functional.pad(MASK, (0, 3)), max_length=10)
        assert torch.equal(wide[:, :4], e.token_weights(MASK, max_length=10)) and (wide[:, 4:] == 0).all()


def step_of(e, seed=3, n=8, t=5):
    tensors = inputs(seed, n, t)
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.arange(t) < torch.randint(0, t + 1, (n, 1), generator=draw)).double()
    rewards = torch.randn(n, generator=draw, dtype=torch.double)
    if e.needs_sampling_logprobs:
        tensors["sampling_logprobs"] = tensors["old_logprobs"] + tensors["entropy"]
    advantages = e.advantages(
        rewards,
        mask,
        group_size=4,
        logprobs=tensors["old_logprobs"],
        ref_logprobs=tensors["ref_logprobs"],
        baseline_value=0.1,
        values=tensors["entropy"],
        greedy_rewards=tensors["entropy"][:, 0],
        score_norms=tensors["entropy"].square(),
    ).policy
    weights = e.token_weights(mask, max_length=9)
    return tensors, advantages, weights, mask


def gradient(e, tensors, advantages, weights, mask, rows):
    """Loss and gradient to the logprobs, of some rows."""
    logprobs = tensors["logprobs"].clone().requires_grad_()
    rest = {name: x[rows] for name, x in tensors.items() if name != "logprobs"}
    loss = e.loss(logprobs[rows], advantages[rows], weights[rows], mask[rows], **rest)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from([{}, FULL, PATHS, {"returns": "reward_to_go", "beta": 0.2}]),
    st.lists(st.integers(0, 3), min_size=8, max_size=8),
)
def test_slices_of_a_step_add_up_to_it(name, overrides, part_of_row) -> None:
    e = Estimator.preset(name, **overrides)
    step = step_of(e)
    whole = gradient(e, *step, slice(None))
    parts = [gradient(e, *step, torch.tensor(part_of_row) == k) for k in range(4)]
    for total, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(sum(pieces), total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("spoil", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("terms", [FULL, PATHS, PATHS | {"kl_estimator": "k2_sequence"}])
def test_nothing_leaks_from_masked_positions(name, spoil, terms) -> None:
    e = Estimator.preset(name, **terms)
    tensors, advantages, weights, mask = step_of(e)
    clean = gradient(e, tensors, advantages, weights, mask, slice(None))
    spoiled = {k: x.masked_fill(mask == 0, spoil) for k, x in tensors.items()}
    dirty = gradient(e, spoiled, advantages, weights.masked_fill(mask == 0, spoil), mask, slice(None))
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    # a row of zero weight may hold anything too
    weights = weights.clone()
    weights[0] = 0
    spoiled["logprobs"][0] = spoil
    assert gradient(e, spoiled, advantages, weights, mask, slice(None))[1].isfinite().all()


def test_the_loss_term_by_term() -> None:
    e = Estimator(ratio="none", **FULL)
    tensors, advantages, weights, mask = step_of(e)
    lp, ref, h = tensors["logprobs"], tensors["ref_logprobs"], tensors["entropy"]
    k3 = (ref - lp).exp() - 1 - (ref - lp)
    wanted = -(weights * (advantages[:, None] * lp - 0.3 * k3 + 0.1 * h)).sum()
    loss = e.loss(lp, advantages, weights, mask, ref_logprobs=ref, entropy=h)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    low = [x.float() for x in (lp, advantages, weights, mask, ref, h)]
    assert e.loss(*low[:4], ref_logprobs=low[4], entropy=low[5]).dtype == torch.float32


@pytest.mark.parametrize("advantage", [2.0, -3.0])
@pytest.mark.parametrize("high", [None, 0.5])
def test_clip_by_hand(advantage, high) -> None:
    """Beyond the clip in the direction of the advantage the gradient is zero, elsewhere it is rho A."""
    ratios = torch.tensor([[0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.49, 1.51, 3.0]], dtype=torch.double)
    e = Estimator(baseline="none", ratio="token", epsilon=0.2, epsilon_high=high)
    ceiling = 1.2 if high is None else 1.5
    one = torch.ones_like(ratios)
    logprobs = ratios.log().requires_grad_()
    loss = e.loss(logprobs, torch.tensor([advantage]), one, one, old_logprobs=torch.zeros_like(ratios))
    gradients = torch.autograd.grad(loss, logprobs)[0][0].tolist()
    value = 0.0
    for ratio, got in zip(ratios[0].tolist(), gradients, strict=True):
        dead = ratio > ceiling if advantage > 0 else ratio < 0.8
        assert got == pytest.approx(0.0 if dead else -ratio * advantage, abs=1e-12)
        bound = min(ratio, ceiling) if advantage > 0 else max(ratio, 0.8)
        value -= bound * advantage
    assert loss.item() == pytest.approx(value)


def test_clipped_ratio_at_one_has_the_gradient_of_reinforce() -> None:
    plain, clipped = Estimator(), Estimator(ratio="token")
    tensors, advantages, weights, mask = step_of(plain)
    tensors["old_logprobs"] = tensors["logprobs"]
    a = gradient(plain, tensors, advantages, weights, mask, slice(None))[1]
    b = gradient(clipped, tensors, advantages, weights, mask, slice(None))[1]
    torch.testing.assert_close(a, b, rtol=1e-14, atol=0)
    assert a.abs().sum() > 0


def test_only_logprobs_and_entropy_carry_a_gradient() -> None:
    e = Estimator(ratio="token", **FULL)
    tensors, advantages, weights, mask = step_of(e)
    for x in tensors.values():
        x.requires_grad_()
    lp = tensors.pop("logprobs")
    e.loss(lp, advantages.requires_grad_(), weights, mask, **tensors).backward()
    assert lp.grad is not None and tensors["entropy"].grad is not None
    assert tensors["old_logprobs"].grad is None and tensors["ref_logprobs"].grad is None
    assert advantages.grad is None


def test_missing_inputs_are_refused() -> None:
    x, one = torch.zeros(2, 3), torch.ones(2, 3)
    for fields, words in (
        ({"ratio": "token"}, "old_logprobs"),
        ({"beta": 0.1, "kl_placement": "loss"}, "ref_logprobs"),
        ({"entropy_coef": 0.1}, "entropy"),
    ):
        with pytest.raises(Refused, match=words):
            Estimator(**fields).loss(x, one[:, 0], one, one)
    for length in (None, 0):
        with pytest.raises(Refused, match="max_length"):
            Estimator(aggregation="fixed_length").token_weights(one, max_length=length)
        Estimator().token_weights(one, max_length=length)
    with pytest.raises(ValueError, match="shapes"):
        Estimator().loss(x[:, :2], one[:, 0], one, one)


def test_critic_loss() -> None:
    weights = torch.tensor([[0.5, 0.25, 0.0]])
    values = torch.tensor([[1.0, 4.0, torch.nan]], requires_grad=True)
    returns = torch.tensor([[3.0, 2.0, torch.inf]], requires_grad=True)
    loss = Estimator().critic_loss(values, returns, weights)
    assert loss.item() == pytest.approx(0.5 * (0.5 * 4 + 0.25 * 4))
    loss.backward()
    assert values.grad.tolist() == [[-1.0, 0.5, 0.0]] and returns.grad is None
