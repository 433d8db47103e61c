"""Baselines, scales and returns: identities, exact zeros, abstentions, and that they run under vmap."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrl.core import Estimator
from tokenrl.core.baselines import RunningMean
from tokenrl.core.bias import EFFECTS
from tokenrl.core.returns import reward_to_go, token_rewards
from tokenrl.core.rules import Refused

BASELINES, SCALES = tuple(EFFECTS["baseline"]), tuple(EFFECTS["scale"])
MEANS = ("batch_mean", "group_mean", "rloo")
quick = settings(max_examples=60, deadline=None)
reals = st.floats(-50, 50, allow_nan=False)


@st.composite
def steps(draw):
    """Rewards [B, G] of a step, with two or more a group."""
    prompts, size = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    values = draw(st.lists(reals, min_size=prompts * size, max_size=prompts * size))
    return torch.tensor(values, dtype=torch.double).reshape(prompts, size)


def advantages(rewards, *, mask=None, baseline_value=0.5, **fields):
    """Policy advantages of rewards [B, G] (or [N, T] with a mask)."""
    size = rewards.shape[1] if mask is None else fields.pop("group_size")
    rewards = rewards.reshape(-1) if mask is None else rewards
    mask = torch.ones(len(rewards), 3, dtype=rewards.dtype) if mask is None else mask
    extra = {k: fields.pop(k) for k in ("valid", "logprobs", "ref_logprobs") if k in fields}
    e = Estimator(**fields)
    return e.advantages(rewards, mask, group_size=size, baseline_value=baseline_value, **extra).policy


@quick
@given(steps())
def test_means_against_their_definitions(rewards) -> None:
    size, flat = rewards.shape[1], rewards.reshape(-1)
    centred = (rewards - rewards.mean(1, keepdim=True)).reshape(-1)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(advantages(rewards, baseline="group_mean"), centred, **close)
    torch.testing.assert_close(advantages(rewards, baseline="batch_mean"), flat - flat.mean(), **close)
    torch.testing.assert_close(advantages(rewards, baseline="rloo"), size / (size - 1) * centred, **close)
    others = [(row.sum() - r) / (size - 1) for row in rewards for r in row]
    torch.testing.assert_close(advantages(rewards, baseline="rloo"), flat - torch.stack(others), **close)
    assert torch.equal(advantages(rewards, baseline="none"), flat)
    torch.testing.assert_close(advantages(rewards, baseline="running_mean"), flat - 0.5)
    constant = advantages(rewards, baseline="constant", baseline_constant=2.0)
    torch.testing.assert_close(constant, flat - 2.0)


@quick
@given(steps(), st.sampled_from([0, 1]), st.sampled_from([1e-9, 0.3]))
def test_scales_against_their_definitions(rewards, ddof, eps) -> None:
    flat = rewards.reshape(-1)
    if rewards.std(1).min() < 1e-6:
        return
    fields = {"baseline": "none", "scale_ddof": ddof, "scale_eps": eps}
    by_group = rewards / (rewards.std(1, correction=ddof, keepdim=True) + eps)
    torch.testing.assert_close(advantages(rewards, scale="group_std", **fields), by_group.reshape(-1))
    by_step = flat / (flat.std(correction=ddof) + eps)
    torch.testing.assert_close(advantages(rewards, scale="batch_std", **fields), by_step)


@quick
@given(steps(), st.sampled_from(MEANS), st.sampled_from(SCALES), reals)
def test_means_ignore_a_shift_and_rows_may_be_permuted(rewards, baseline, scale, shift) -> None:
    fields = {"baseline": baseline, "scale": scale, "scale_eps": 0.1}
    plain = advantages(rewards, **fields)
    torch.testing.assert_close(advantages(rewards + shift, **fields), plain, rtol=1e-6, atol=1e-6)
    order = torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(0))
    permuted = advantages(rewards[:, order], **fields)
    torch.testing.assert_close(permuted, plain.reshape(rewards.shape)[:, order].reshape(-1))


@pytest.mark.parametrize(("baseline", "ddof"), [("rloo", 1), ("group_mean", 0)])
def test_a_mean_baseline_makes_the_gradient_a_covariance(baseline, ddof) -> None:
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(1, 6, generator=draw, dtype=torch.double)
    scores = torch.randn(6, 4, generator=draw, dtype=torch.double)
    gradient = (advantages(rewards, baseline=baseline)[:, None] * scores).mean(0)
    covariance = torch.cov(torch.cat([rewards, scores.T]), correction=ddof)[0, 1:]
    torch.testing.assert_close(gradient, covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("baseline", MEANS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(baseline, scale, dtype) -> None:
    values = torch.cat([torch.arange(1, 100) / 100, torch.arange(1, 100)])
    for size in range(2, 17):
        for eps in (0.0, 1e-9, 1e-4):
            fields = {"baseline": baseline, "scale": scale, "scale_eps": eps, "group_size": size}
            if baseline == "batch_mean" or scale == "batch_std":  # the whole step is one set
                rewards = values[:, None].expand(-1, size).to(dtype)
                got = torch.vmap(lambda r: advantages(r, mask=torch.ones(len(r), 3), **fields))(rewards)  # noqa: B023
            else:
                rewards = values.repeat_interleave(size).to(dtype)
                got = advantages(rewards, mask=torch.ones(len(rewards), 3), **fields)
            assert (got == 0).all(), (size, eps)


@pytest.mark.parametrize("baseline", MEANS)
def test_equal_rewards_give_exactly_zero_when_the_first_row_abstains(baseline) -> None:
    for value in torch.arange(1, 100) / 100:
        rewards, valid = value.repeat(9), torch.arange(9) % 9 > 0
        fields = {"baseline": baseline, "scale": "group_std", "scale_eps": 1e-9, "group_size": 9}
        got = advantages(rewards.masked_fill(~valid, torch.nan), mask=torch.ones(9, 3), valid=valid, **fields)
        assert (got == 0).all()


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_abstaining_rows_count_nowhere(baseline, scale, returns) -> None:
    """Taking the row away gives the others the same advantages, whatever the row held."""
    rewards = torch.tensor([1.0, 2.5, 4.0, 0.5, 3.0, -1.0], dtype=torch.double)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]] * 2).double()
    fields = {"baseline": baseline, "scale": scale, "returns": returns}
    for gone in ([0, 3], [1, 4], [2, 5]):
        valid = torch.ones(6, dtype=torch.bool)
        valid[gone] = False
        spoiled = rewards.masked_fill(~valid, torch.nan)
        got = advantages(spoiled, mask=mask, group_size=3, valid=valid, **fields)
        without = advantages(rewards[valid], mask=mask[valid], group_size=2, **fields)
        torch.testing.assert_close(got[valid], without)
        assert (got[~valid] == 0).all()


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_a_row_left_alone_has_no_advantage(returns) -> None:
    rewards = torch.tensor([[7.0, 1, 2], [torch.nan] * 3, [1, 0, 0], [3, 0, 0]], dtype=torch.double)
    valid = torch.tensor([True, False, True, True])
    mask = torch.ones(4, 3)
    choices = [{"baseline": b} for b in ("group_mean", "rloo")]
    for fields in [*choices, {"baseline": "none", "scale": "group_std"}]:
        got = advantages(rewards, mask=mask, group_size=2, valid=valid, returns=returns, **fields)
        assert (got[:2] == 0).all() and (got[2:] != 0).any() and got.isfinite().all()
    nobody = advantages(rewards * torch.nan, mask=mask, group_size=2, valid=valid & False, returns=returns)
    assert (nobody == 0).all()


def test_a_reward_is_paid_at_the_last_action_and_summed_back() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).bool()
    rewards = token_rewards(torch.tensor([2.0, 3.0, 5.0]), mask, torch.ones(3).bool())
    assert rewards.tolist() == [[0, 2, 0], [0, 0, 3], [5, 0, 0]]
    assert reward_to_go(rewards).tolist() == [[2, 2, 0], [3, 3, 3], [5, 0, 0]]
    assert reward_to_go(rewards, 0.5).tolist() == [[1, 2, 0], [0.75, 1.5, 3], [5, 0, 0]]
    dense = torch.tensor([[1.0, 2.0, 4.0]])
    assert reward_to_go(dense, 0.5).tolist() == [[3.0, 4.0, 4.0]]
    torch.testing.assert_close(reward_to_go(dense, 1 - 1e-7), reward_to_go(dense))
    assert reward_to_go(torch.ones(1, 3000), 0.5).isfinite().all()


def test_what_an_environment_pays_between_actions_counts() -> None:
    mask = torch.tensor([[1.0, 0, 1], [1, 0, 1]])
    rewards = torch.tensor([[1.0, 10, 100], [0, 0, 0]])
    assert advantages(rewards, mask=mask, group_size=2, baseline="none").tolist() == [111, 0]
    to_go = advantages(rewards, mask=mask, group_size=2, baseline="none", returns="reward_to_go")
    assert to_go.tolist() == [[111, 0, 100], [0, 0, 0]]


@pytest.mark.parametrize("kind", ["total", "reward_to_go"])
def test_kl_in_the_reward_by_hand(kind) -> None:
    """It enters before the baseline, per token, and what is masked holds anything."""
    logprobs = torch.tensor([[-1.0, -2.0, torch.nan], [-0.5, -0.25, -0.125]], dtype=torch.double)
    ref = torch.tensor([[-1.5, -1.0, -torch.inf], [-0.5, -0.5, -0.5]], dtype=torch.double)
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]], dtype=torch.double)
    e = Estimator(beta=2.0, baseline="rloo", returns=kind)
    got = e.advantages(
        torch.tensor([1.0, 4.0], dtype=torch.double), mask, group_size=2, logprobs=logprobs, ref_logprobs=ref
    )
    # log ratios .5, -1 and 0, .25, .375: returns 1 - 2(-.5) = 2 and 4 - 2(.625) = 2.75
    to_go = [[2.0, 3.0, 0.0], [2.75, 2.75, 3.25]]
    assert got.returns.tolist() == to_go
    wanted = {"total": [-0.75, 0.75], "reward_to_go": [[-0.75, 0.25, 0], [0.75, 0.75, 1.25]]}
    assert got.policy.tolist() == wanted[kind]


def test_advantages_carry_no_gradient() -> None:
    logprobs = torch.randn(4, 3, requires_grad=True)
    e = Estimator(beta=1.0)
    rewards = torch.randn(4, requires_grad=True)
    got = e.advantages(rewards, torch.ones(4, 3), group_size=2, logprobs=logprobs, ref_logprobs=logprobs)
    assert not got.policy.requires_grad and not got.returns.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_precision_is_kept_and_vmap_agrees_with_a_loop(dtype, returns) -> None:
    draw = torch.Generator().manual_seed(1)
    rewards = torch.randn(5, 4, generator=draw, dtype=dtype)
    mask = torch.rand(5, 4, 3, generator=draw) > 0.3
    valid = torch.rand(5, 4, generator=draw) > 0.3
    logp, ref = torch.randn(2, 5, 4, 3, generator=draw, dtype=dtype)
    for baseline in BASELINES:
        for scale in SCALES:
            e = Estimator(baseline=baseline, scale=scale, returns=returns, beta=0.1, gamma=0.9)

            def policy(r, m, v, lp, rf, e=e):
                got = e.advantages(
                    r,
                    m,
                    group_size=2,
                    valid=v,
                    logprobs=lp,
                    ref_logprobs=rf,
                    baseline_value=torch.tensor(0.3),
                )
                return got.policy, e.token_weights(m.to(dtype), max_length=7, valid=v)

            together = torch.vmap(policy)(rewards, mask, valid, logp, ref)
            apart = zip(*map(policy, rewards, mask, valid, logp, ref), strict=True)
            for a, b in zip(together, apart, strict=True):
                assert a.dtype == dtype
                torch.testing.assert_close(a, torch.stack(b), rtol=1e-5, atol=1e-6)


def test_rewards_of_other_types() -> None:
    for rewards in (torch.tensor([True, False]), torch.tensor([1, 0])):
        assert advantages(rewards[None], baseline="rloo").tolist() == [1.0, -1.0]


def test_inputs_that_are_missing_or_do_not_fit_are_refused() -> None:
    four, mask = torch.arange(4.0), torch.ones(4, 3)
    grouped = [Estimator(baseline="rloo"), Estimator(baseline="group_mean")]
    for e in [*grouped, Estimator(baseline="none", scale="group_std")]:
        for size, words in ((None, "group_size is None"), (1, "group_size is 1"), (3, "multiple")):
            with pytest.raises(Refused, match=words):
                e.advantages(four, mask, group_size=size)
    for e in (Estimator(baseline="batch_mean"), Estimator(baseline="none", scale="batch_std")):
        e.advantages(four, mask, group_size=None)
        with pytest.raises(Refused, match="step has 1"):
            e.advantages(four[:1], mask[:1], group_size=None)
    with pytest.raises(Refused, match="baseline_value"):
        Estimator(baseline="running_mean").advantages(four, mask, group_size=2)
    with pytest.raises(Refused, match="logprobs"):
        Estimator(beta=0.1).advantages(four, mask, group_size=2)
    with pytest.raises(Refused, match="ref_logprobs"):
        Estimator(beta=0.1).advantages(four, mask, group_size=2, logprobs=mask)
    with pytest.raises(Refused, match="bootstrap"):
        Estimator().advantages(four, mask, group_size=2, bootstrap=four)
    with pytest.raises(ValueError, match="fit"):
        Estimator().advantages(four[:2], mask, group_size=2)


def test_running_mean() -> None:
    ema, plain = RunningMean(decay=0.75, initial=2.0), RunningMean()
    assert (ema.value, plain.value) == (2.0, 0.0)
    valid = torch.tensor([True, True, False])
    for mean in (ema, plain):
        mean.update(torch.tensor([1.0, 5.0, torch.nan]), valid=valid)
    assert (ema.value, plain.value) == (2.25, 3.0)
    for mean in (ema, plain):
        mean.update(torch.tensor([[6.0, 0.0], [4.0, 2.0], [5.0, 1.0], [6.0, 0.0]]))
        mean.update(torch.tensor([torch.nan]), valid=torch.tensor([False]))
    assert ema.value == pytest.approx(0.75 * 2.25 + 0.25 * 6.0)
    assert plain.value == pytest.approx((2 * 3 + 4 * 6) / 6)
    again = RunningMean()
    again.load_state_dict(plain.state_dict())
    for mean in (again, plain):
        mean.update(torch.tensor([10.0]))
    assert again.value == plain.value == pytest.approx(40 / 7)
    assert all(type(v) is float for v in plain.state_dict().values())
