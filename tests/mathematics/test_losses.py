"""Weights and losses: aggregation, clipping, sums over slices, and nothing leaking from masked positions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tokenrl.core import Estimator
from tokenrl.core.choices import AXES
from tokenrl.core.losses import LEAST_BETA, PER_TOKEN, next_beta, token_entropy
from tokenrl.core.presets import PRESETS
from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Refused
from tokenrl.lab import tabular_problem

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


ONE = torch.ones(1, 2, dtype=torch.double)


def run(log_ratio, advantage, *, mask=ONE, weights=ONE, **fields):
    """Loss and gradient [T] of one row."""
    e = Estimator(baseline="none", **fields)
    logprobs = torch.tensor([log_ratio], dtype=torch.double).requires_grad_()
    loss = e.loss(logprobs, torch.tensor([advantage]), weights, mask, old_logprobs=torch.zeros(1, 2))
    return loss.item(), torch.autograd.grad(loss, logprobs)[0][0].tolist()


def test_ratios_of_a_sequence_by_hand() -> None:
    tokens = [math.log(1.1), math.log(1.3)]
    mean, product = (1.1 * 1.3) ** 0.5, 1.1 * 1.3
    value, slope = run(tokens, 2.0, ratio="sequence_mean", epsilon=0.5)
    assert value == pytest.approx(-4 * mean) and slope == pytest.approx([-2 * mean] * 2)
    value, slope = run(tokens, 2.0, ratio="sequence_mean", epsilon=0.1)
    assert value == pytest.approx(-4 * 1.1) and slope == [0, 0]
    value, slope = run(tokens, -2.0, ratio="sequence_mean", epsilon=0.1)
    assert slope == pytest.approx([2 * mean] * 2)
    value, slope = run(tokens, 2.0, ratio="sequence_product", epsilon=0.1)
    assert value == pytest.approx(-4 * product) and slope == pytest.approx([-2 * product] * 2)
    # GSPO's own objective, the ratio differentiated through its mean, with its 1/L
    x = torch.tensor(tokens, dtype=torch.double, requires_grad=True)
    (2 * x.mean().exp()).backward()
    _, slope = run(tokens, 2.0, ratio="sequence_mean", epsilon=0.5, weights=ONE / 2)
    assert slope == pytest.approx((-x.grad).tolist())
    half = torch.tensor([[1.0, 0.0]], dtype=torch.double)
    _, slope = run([tokens[0], torch.nan], 2.0, ratio="sequence_mean", epsilon=0.5, mask=half)
    assert slope == pytest.approx([-2.2, 0.0])


def test_cispo_keeps_the_gradient_of_what_it_clips() -> None:
    tokens = [math.log(0.5), math.log(3.0)]
    _, slope = run(tokens, 2.0, ratio="cispo", epsilon=0.2, epsilon_high=0.5)
    assert slope == pytest.approx([-2 * 0.8, -2 * 1.5])
    assert run([0.0, 0.0], 2.0, ratio="cispo")[1] == [-2.0, -2.0]


def test_dual_clip_bounds_the_pull_of_negative_advantages() -> None:
    tokens = [math.log(2.0), math.log(4.0)]
    value, slope = run(tokens, -1.0, ratio="token", dual_clip=3.0)
    assert value == pytest.approx(2 + 3) and slope == pytest.approx([2.0, 0.0])
    assert run(tokens, -1.0, ratio="token")[1] == pytest.approx([2.0, 4.0])
    assert run(tokens, 1.0, ratio="token", dual_clip=3.0) == run(tokens, 1.0, ratio="token")


@pytest.mark.parametrize("ratio", ["none", "token"])
def test_importance_weights_against_the_sampler_are_truncated(ratio) -> None:
    e = Estimator(baseline="none", ratio=ratio, importance_cap=1.5, beta=0.1, kl_placement="loss")
    logprobs = torch.tensor([[-1.0, -2.0]], dtype=torch.double).requires_grad_()
    sampler = logprobs.detach() - torch.tensor([[2.0, 0.8]], dtype=torch.double).log()
    arguments = (torch.tensor([3.0]), ONE, ONE)
    given = {"old_logprobs": logprobs.detach(), "ref_logprobs": torch.zeros(1, 2)}
    loss = e.loss(logprobs, *arguments, sampling_logprobs=sampler, **given)
    slope = torch.autograd.grad(loss, logprobs)[0][0].tolist()
    assert slope == pytest.approx([-3 * 1.5 + 0.1, -3 * 0.8 + 0.1])  # the KL is not weighed
    with pytest.raises(Refused, match="sampling_logprobs"):
        e.loss(logprobs, *arguments, **given)


def test_clipped_values() -> None:
    values = torch.tensor([[1.0, 3.0]], dtype=torch.double, requires_grad=True)
    goal, old = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 2.9]])
    e = Estimator(value_clip=0.5)
    loss = e.critic_loss(values, goal, ONE, old_values=old)
    assert loss.item() == pytest.approx((1.5**2 + 1.0**2) / 2)  # the clipped 0.5 is further off than 1.0
    assert torch.autograd.grad(loss, values)[0].tolist() == [[0.0, 1.0]]
    with pytest.raises(Refused, match="old_values"):
        e.critic_loss(values, goal, ONE)


def test_the_kl_and_entropy_of_each_token() -> None:
    """Values and slopes: k1 and k3 have the mean KL, k2 has not; the paths have the stated gradients."""
    problem = tabular_problem(30)
    chance, lp, ref = problem.chances[0], problem.logprobs[0], problem.ref_logprobs[0]
    kl = chance @ (lp - ref).sum(-1)
    for name, same in (("k1", True), ("k2", False), ("k3", True)):
        assert torch.allclose(chance @ PER_TOKEN[name](lp, ref).sum(-1), kl, rtol=1e-12) == same
    assert (PER_TOKEN["k3"](lp, ref) >= 0).all() and (PER_TOKEN["k1"](lp, ref) < 0).any()
    near = PER_TOKEN["k3"](lp, lp + 1e-9)  # exp(-l) - 1 + l would lose every digit here
    torch.testing.assert_close(near, torch.full_like(lp, 5e-19), rtol=1e-6, atol=0)
    ratio, mask = lp - ref, problem.mask
    slopes = {
        "full_path": ratio.flip(-1).cumsum(-1).flip(-1),
        "k2_sequence": ratio.sum(-1, keepdim=True).expand(15, 3),
        "k2": ratio,
        "k3": 1 - (-ratio).exp(),
    }
    for name, wanted in slopes.items():
        slope = torch.func.grad(lambda x, f=PER_TOKEN[name]: f(x, ref).sum())(lp)
        torch.testing.assert_close(slope, wanted, rtol=1e-10, atol=1e-12)
    assert torch.equal(PER_TOKEN["full_path"](lp, ref), ratio)
    h = problem.entropy[0]
    e = Estimator(baseline="none", entropy_coef=1.0, entropy_form="sequence")
    loss = lambda x: -e.loss(x, torch.zeros(15), mask, mask, entropy=h)  # noqa: E731
    torch.testing.assert_close(loss(lp), h.sum())
    later = h.flip(-1).cumsum(-1).flip(-1) - h
    torch.testing.assert_close(torch.func.grad(loss)(lp), later * mask, rtol=1e-10, atol=1e-12)


def test_entropy_of_a_token() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf]], dtype=torch.double)
    logits.requires_grad_()
    entropy = token_entropy(logits)
    assert entropy.tolist() == pytest.approx([math.log(4), math.log(2)])
    entropy.sum().backward()
    assert logits.grad.isfinite().all()
    x = torch.randn(5, 7, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(token_entropy(x), torch.distributions.Categorical(logits=x).entropy())
    assert torch.autograd.gradcheck(token_entropy, x.requires_grad_())


def test_the_error_where_there_is_one_group_or_one_number():
    values = torch.tensor([1.0, 4.0, 4.0, 7.0], dtype=torch.double)
    mean, error = mean_and_error(values, 4)
    assert (mean, error) == (4.0, pytest.approx(math.sqrt(6) / 2))
    assert mean_and_error(values, 2)[1] == pytest.approx(3 / math.sqrt(2) / math.sqrt(2))
    mean, error = mean_and_error(values[:1])
    assert mean == 1 and torch.isnan(error)


def test_the_error_of_a_mean_is_that_of_independent_groups() -> None:
    """All 16 steps of two groups of two, drawn from two prompts of equal completions: E error^2 = Var."""
    draws = itertools.product((0.0, 3.0), (1.0, -1.0), (0.0, 3.0), (1.0, -1.0))
    rows = torch.tensor([[a + b, a, c + d, c] for a, b, c, d in draws], dtype=torch.double)
    squares = torch.stack([mean_and_error(x, 2)[1] ** 2 for x in rows])
    assert float(squares.mean()) == pytest.approx(float(rows.mean(-1).var(correction=0)), rel=1e-12)
    alone = torch.stack([mean_and_error(x, 1)[1] ** 2 for x in rows])  # rows of a group are not independent
    assert alone.mean() < 0.8 * squares.mean()


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [(6.0, 0.5), (6.6, 0.505), (5.4, 0.495), (60.0, 0.51), (0.0, 0.49), (-3.0, 0.49), (math.inf, 0.51)],
)
def test_beta_moves_by_the_formula(kl, wanted):
    """K = 0.1, target 6: the relative error, at most a fifth either way, times a tenth."""
    assert next_beta(0.5, kl, target=6.0) == pytest.approx(wanted, abs=1e-12)


def test_beta_stays_above_zero_and_an_unknown_kl_moves_nothing():
    assert next_beta(0.5, math.nan, target=6.0) == 0.5
    assert next_beta(0.5, 0.0, target=6.0, gain=4.999) > 0
    assert next_beta(LEAST_BETA, 0.0, target=6.0) == LEAST_BETA
