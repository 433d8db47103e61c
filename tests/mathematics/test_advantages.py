"""Baselines, scales and returns: identities, exact zeros, abstentions, and that they run under vmap."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

from tokenrl.core import Estimator
from tokenrl.core.baselines import RunningMean
from tokenrl.core.choices import AXES
from tokenrl.core.estimator import IN_UNITS_OF_THE_EPISODE
from tokenrl.errors import Refused

BASELINES, SCALES = AXES["baseline"], AXES["scale"]
MEANS = ("batch_mean", "group_mean", "rloo", "opo", "optimal", "shrinkage", "timestep_mean")
ROWWISE = ("none", "group_std", "batch_std", "loo_std", "other_groups_std", "token_whiten")
quick = settings(max_examples=60, deadline=None)
reals = st.floats(-50, 50, allow_nan=False)


@st.composite
def steps(draw):
    """Rewards [B, G] of a step, with two or more per group."""
    prompts, size = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    values = draw(st.lists(reals, min_size=prompts * size, max_size=prompts * size))
    return torch.tensor(values, dtype=torch.double).reshape(prompts, size)


def advantages(rewards, *, mask=None, baseline_value=0.5, **fields):
    """Policy advantages of rewards [B, G] (or [N, T] with a mask)."""
    size = rewards.shape[1] if mask is None else fields.pop("group_size")
    rewards = rewards.reshape(-1) if mask is None else rewards
    mask = torch.ones(len(rewards), 3, dtype=rewards.dtype) if mask is None else mask
    names = ("valid", "logprobs", "ref_logprobs", "values", "greedy_rewards", "score_norms", "bootstrap")
    extra = {k: fields.pop(k) for k in names if k in fields}
    if fields.get("baseline") == "optimal":
        extra.setdefault("score_norms", torch.ones_like(mask, dtype=rewards.dtype))
    e = Estimator(**fields)
    return e.advantages(rewards, mask, group_size=size, baseline_value=baseline_value, **extra).policy


def some_inputs(n, t, dtype=torch.double):
    """Every input that a baseline may need."""
    draw = torch.Generator().manual_seed(n)
    return {
        "values": torch.randn(n, t, generator=draw, dtype=dtype),
        "greedy_rewards": torch.randn(n, generator=draw, dtype=dtype),
        "score_norms": torch.rand(n, t, generator=draw, dtype=dtype),
    }


def fits(scale, size, rows=99):
    return not (scale == "loo_std" and size < 3) and not (scale == "other_groups_std" and rows == size)


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
@given(steps(), st.sampled_from([0, 1]), st.sampled_from([1e-6, 0.3]))
def test_scales_against_their_definitions(rewards, ddof, eps) -> None:
    if rewards.std(1).min() < 1e-6:
        return
    (prompts, size), flat = rewards.shape, rewards.reshape(-1)
    lengths = torch.arange(len(flat)) % 3 + 1
    mask, tokens = (torch.arange(3) < lengths[:, None]).double(), flat.repeat_interleave(lengths)

    def std(x):
        return x.std(correction=ddof) + eps

    wanted = {
        "group_std": torch.cat([row / std(row) for row in rewards]),
        "batch_std": flat / std(flat),
        "token_whiten": (flat - tokens.mean()) / std(tokens),
    }
    if size > 2:
        others = [(r, torch.cat([row[:i], row[i + 1 :]])) for row in rewards for i, r in enumerate(row)]
        wanted["loo_std"] = torch.stack([r / std(rest) for r, rest in others])
    if prompts > 1:
        apart = [torch.cat([rewards[:x], rewards[x + 1 :]]) for x in range(prompts)]
        wanted["other_groups_std"] = torch.cat([rewards[x] / std(apart[x]) for x in range(prompts)])
    for scale, expected in wanted.items():
        fields = {"baseline": "none", "scale": scale, "scale_ddof": ddof, "scale_eps": eps}
        got = advantages(flat, mask=mask, group_size=size, **fields)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@quick
@given(steps(), st.sampled_from(MEANS), st.sampled_from(ROWWISE), reals)
def test_means_ignore_a_shift_and_rows_may_be_permuted(rewards, baseline, scale, shift) -> None:
    if not fits(scale, rewards.shape[1], rewards.numel()):
        return
    fields = {"baseline": baseline, "scale": scale, "scale_eps": 0.1}
    plain = advantages(rewards, **fields)
    torch.testing.assert_close(advantages(rewards + shift, **fields), plain, rtol=1e-6, atol=1e-6)
    order = torch.randperm(rewards.shape[1], generator=torch.Generator().manual_seed(0))
    permuted = advantages(rewards[:, order], **fields)
    plain = plain.reshape(*rewards.shape, *plain.shape[1:])[:, order].reshape(permuted.shape)
    torch.testing.assert_close(permuted, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("baseline", "ddof"), [("rloo", 1), ("group_mean", 0)])
def test_a_mean_baseline_makes_the_gradient_a_covariance(baseline, ddof) -> None:
    draw = torch.Generator().manual_seed(0)
    rewards = torch.randn(1, 6, generator=draw, dtype=torch.double)
    scores = torch.randn(6, 4, generator=draw, dtype=torch.double)
    gradient = (advantages(rewards, baseline=baseline)[:, None] * scores).mean(0)
    covariance = torch.cov(torch.cat([rewards, scores.T]), correction=ddof)[0, 1:]
    torch.testing.assert_close(gradient, covariance, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("baseline", MEANS)
@pytest.mark.parametrize("scale", ROWWISE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(baseline, scale, dtype) -> None:
    """In any precision, with next to no eps, also where the first row of each group abstains."""
    values = torch.cat([torch.arange(1, 100) / 100, torch.arange(1, 100)]).to(dtype)
    for size in (4, 7, 16):
        rewards, mask = values[:, None].expand(-1, 2 * size), torch.ones(2 * size, 3)
        for valid in (torch.ones(2 * size).bool(), torch.arange(2 * size) % size > 0):
            fields = {"baseline": baseline, "scale": scale, "scale_eps": 1e-30, "group_size": size}
            spoilt = rewards.masked_fill(~valid, torch.nan)
            got = torch.vmap(lambda r: advantages(r, mask=mask, valid=valid, **fields))(spoilt)  # noqa: B023
            assert (got == 0).all(), size


def exclude_each_other(baseline: str, scale: str, returns: str) -> bool:
    if returns == "total":
        return "episode" in baseline + scale
    return returns == "episode_normalized" and baseline not in IN_UNITS_OF_THE_EPISODE


@pytest.mark.parametrize("returns", AXES["returns"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_abstaining_rows_count_nowhere(baseline, scale, returns) -> None:
    """Removing a row of each group gives the others the same advantages, whatever the row holds."""
    if exclude_each_other(baseline, scale, returns):
        return
    rewards = torch.tensor([1.0, 2.5, 4.0, 0.5, 3.0, -1.0, 2.0, 0.1, 0.7, -2.0, 5.0, 1.5, 0.2, 6.0, 1.1, 3.3])
    rewards = rewards.double()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]] * 4).double()
    fields = {"baseline": baseline, "scale": scale, "returns": returns}
    more = some_inputs(16, 3)
    valid = ~torch.eye(4, dtype=torch.bool).flatten()  # another place in each group
    spoiled = rewards.masked_fill(~valid, torch.nan)
    spoilt = {k: x.masked_fill(~valid.reshape(-1, *[1] * (x.ndim - 1)), torch.nan) for k, x in more.items()}
    got = advantages(spoiled, mask=mask, group_size=4, valid=valid, **fields, **spoilt)
    rest = {k: x[valid] for k, x in more.items()}
    without = advantages(rewards[valid], mask=mask[valid], group_size=3, **fields, **rest)
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


def returns_of(rewards, mask=None, **fields):
    """The critic's targets: what each position is credited with."""
    mask = torch.ones_like(rewards) if mask is None else mask
    e = Estimator(baseline="none", **({"returns": "reward_to_go"} | fields))
    return e.advantages(rewards, mask, group_size=None).returns.tolist()


def test_returns_by_hand() -> None:
    """A single reward is paid at the last action, or at the first position of a row without any."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    single, dense = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert returns_of(single, mask) == [[2, 2, 0], [3, 3, 3], [5, 0, 0]]
    assert returns_of(single, mask, gamma=0.5) == [[1, 2, 0], [0.75, 1.5, 3], [5, 0, 0]]
    assert returns_of(dense, gamma=0.5) == [[4, 6, 8, 8]]
    assert returns_of(dense, gamma=1 - 1e-7) == [pytest.approx([15, 14, 12, 8])]
    assert all(x < 3 for x in returns_of(torch.ones(1, 3000), gamma=0.5)[0])  # no power overflows
    for window, gamma, wanted in ((1, 1.0, dense[0]), (2, 1.0, [3, 6, 12, 8]), (2, 0.5, [2, 4, 8, 8])):
        assert returns_of(dense, returns="blame_window", window=window, gamma=gamma) == [list(wanted)]
    assert returns_of(dense, returns="blame_window", window=9) == [[15, 14, 12, 8]]
    got = advantages(dense, mask=torch.ones(1, 4), group_size=None, baseline="none", returns="blame_window")
    assert got.tolist() == [[15, 14, 12, 8]]


@pytest.mark.parametrize("ddof", [0, 1])
def test_returns_normalised_in_each_episode(ddof) -> None:
    """By hand in each row; and without a critic they are the baseline and the scale of the same name."""
    draw = torch.Generator().manual_seed(4)
    lengths = [5, 3, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rewards = torch.randn(3, 5, generator=draw, dtype=torch.double) * mask
    values = torch.randn(3, 5, generator=draw, dtype=torch.double).masked_fill(~mask, torch.nan)
    shared = {"gamma": 0.9, "scale_ddof": ddof, "scale_eps": 1e-8}
    e = Estimator(baseline="value", returns="episode_normalized", **shared)
    got = e.advantages(rewards, mask, group_size=None, values=values)
    for row, n in enumerate(lengths):
        to_go = torch.stack([sum(0.9 ** (u - t) * rewards[row, u] for u in range(t, n)) for t in range(n)])
        deviation = to_go.std(correction=ddof) if n > 1 else 0.0
        wanted = (to_go - to_go.mean()) / (deviation + 1e-8)
        torch.testing.assert_close(got.returns[row, :n], wanted)
        torch.testing.assert_close(got.policy[row, :n], wanted - values[row, :n])
    assert (got.policy[~mask] == 0).all() and (got.returns[~mask] == 0).all()
    plain = {"baseline": "none", "returns": "episode_normalized"}
    other = {"baseline": "episode_mean", "scale": "episode_std", "returns": "reward_to_go"}
    one, two = (
        Estimator(**fields, **shared).advantages(rewards, mask, group_size=None).policy
        for fields in (plain, other)
    )
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_gae_is_the_sum_of_discounted_errors(gamma, lam) -> None:
    draw = torch.Generator().manual_seed(4)
    rewards, values = torch.randn(2, 3, 5, generator=draw, dtype=torch.double)
    lengths, beyond = [5, 3, 1], torch.tensor([0.0, 2.0, -1.0], dtype=torch.double)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    rewards = rewards * mask
    e = Estimator(baseline="value", returns="gae", gamma=gamma, lam=lam)
    spoilt = values.masked_fill(~mask, torch.nan)
    got = e.advantages(rewards, mask, group_size=None, values=spoilt, bootstrap=beyond)
    for row, n in enumerate(lengths):
        after = torch.cat([values[row, 1:n], beyond[row, None]])
        delta = rewards[row, :n] + gamma * after - values[row, :n]
        wanted = [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]
        torch.testing.assert_close(got.policy[row, :n], torch.stack(wanted))
        torch.testing.assert_close(got.returns[row, :n], torch.stack(wanted) + values[row, :n])
    assert (got.policy[~mask] == 0).all()


def test_gae_passes_through_what_is_no_action() -> None:
    """A reply of the environment between two actions has no value of its own, but may have a reward."""
    mask, rewards = torch.tensor([[1.0, 1, 0, 1]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    values = torch.tensor([[10.0, 20.0, torch.nan, 40.0]])
    e = Estimator(baseline="value", returns="gae", lam=0.5)
    got = e.advantages(rewards, mask, group_size=None, values=values).returns
    # 4, 3 + 4, 2 + (3 + 40 + 7)/2, 1 + (20 + 27)/2
    assert got.tolist() == [[24.5, 27.0, 7.0, 4.0]]


def test_a_truncation_is_paid_with_the_value_beyond_it() -> None:
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    beyond = torch.tensor([4.0, 0.0])
    got = advantages(
        torch.tensor([1.0, 2.0]), mask=mask, group_size=None, baseline="none", bootstrap=beyond, gamma=0.5
    )
    assert got.tolist() == [1.5, 0.5]  # (1 + 4/2)/2 and 2/4


def test_a_baseline_of_the_users_own() -> None:
    seen = {}

    def mine(totals, *, group_size, mask, valid):
        seen.update(group_size=group_size, mask=mask, valid=valid)
        return totals.mean() + torch.zeros(len(totals))

    rewards, valid = torch.tensor([[1.0, 2.0], [3.0, torch.nan]]), torch.tensor([True, True, True, False])
    got = advantages(rewards, baseline=mine, valid=valid)
    assert got.tolist() == [-0.5, 0.5, 1.5, 0] and seen["group_size"] == 2
    assert torch.equal(seen["valid"], valid) and torch.equal(seen["mask"].any(1), valid)
    each = advantages(rewards, baseline=lambda totals, mask, **_: 2.0 * mask, returns="reward_to_go")
    assert each.tolist()[:2] == [[-1] * 3, [0] * 3]


def test_means_along_the_row_and_across_rows_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [2.0, 2.0, 0.0]], dtype=torch.double)
    mask = torch.tensor([[1.0, 1, 1], [1, 0, 0], [1, 1, 0]])
    fields = {"mask": mask, "group_size": None, "returns": "reward_to_go"}
    got = advantages(rewards, baseline="episode_mean", **fields)
    third = 14 / 3
    assert torch.allclose(
        got, torch.tensor([[6 - third, 5 - third, 3 - third], [0, 0, 0], [1, -1, 0]]).double()
    )
    got = advantages(rewards, baseline="none", scale="episode_std", scale_ddof=1, scale_eps=0.0, **fields)
    assert torch.allclose(got[2], torch.tensor([4, 2, 0]).double() / 2**0.5)
    assert (got[1] == 0).all()
    got = advantages(rewards, baseline="timestep_mean", **fields)  # to go 6 5 3, 4, 4 2
    assert got.tolist() == [[2, 3, 1], [-1, 0, 0], [-1, -3, 0]]
    got = advantages(rewards, baseline="timestep_mean", leave_one_out=False, **fields)
    wanted = [[6 - 14 / 3, 1.5, 0], [4 - 14 / 3, 0, 0], [4 - 14 / 3, -1.5, 0]]
    assert torch.allclose(got, torch.tensor(wanted).double())


@pytest.mark.parametrize(
    "fields",
    [
        {"baseline": "opo"},
        {"baseline": "shrinkage"},
        {"baseline": "timestep_mean", "returns": "reward_to_go"},
        *(
            {"baseline": "optimal", "optimal_form": form}
            for form in ("sequence", "per_timestep", "cumulative")
        ),
    ],
    ids=str,
)
def test_what_leaves_the_row_out_does_not_see_it(fields) -> None:
    """A row's baseline does not change with the row's own reward, length or score."""
    draw = torch.Generator().manual_seed(6)
    rewards = torch.randn(9, generator=draw, dtype=torch.double)
    lengths = torch.tensor([3, 1, 2, 2, 3, 1, 1, 3, 3])
    norms = torch.rand(9, 3, generator=draw, dtype=torch.double)

    def baseline(rewards, lengths, norms):
        mask = (torch.arange(3) < lengths[:, None]).double()
        got = advantages(rewards, mask=mask, group_size=3, score_norms=norms, **fields)
        return (rewards[:, None] - got.reshape(9, -1)).expand(9, 3)

    before = baseline(rewards, lengths, norms)
    for row in range(9):
        other = [x.clone() for x in (rewards, lengths, norms)]
        other[0][row] += 1e6
        other[1][row] = 3
        other[2][row] *= 1e6
        after, acts = baseline(*other), torch.arange(3) < lengths[row]
        torch.testing.assert_close(after[row][acts], before[row][acts], rtol=1e-7, atol=1e-7)
        assert not torch.allclose(after, before)


def test_what_an_environment_pays_between_actions_counts() -> None:
    mask = torch.tensor([[1.0, 0, 1], [1, 0, 1]])
    rewards = torch.tensor([[1.0, 10, 100], [0, 0, 0]])
    assert advantages(rewards, mask=mask, group_size=2, baseline="none").tolist() == [111, 0]
    to_go = advantages(rewards, mask=mask, group_size=2, baseline="none", returns="reward_to_go")
    assert to_go.tolist() == [[111, 0, 100], [0, 0, 0]]


@pytest.mark.parametrize("kind", ["total", "reward_to_go"])
def test_kl_in_the_reward_by_hand(kind) -> None:
    """It is added per token before the baseline, and masked positions may hold anything."""
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
@pytest.mark.parametrize("returns", AXES["returns"])
def test_precision_is_kept_and_vmap_agrees_with_a_loop(dtype, returns) -> None:
    draw = torch.Generator().manual_seed(1)
    rewards = torch.randn(3, 6, generator=draw, dtype=dtype)
    mask = torch.rand(3, 6, 3, generator=draw) > 0.3
    valid = torch.rand(3, 6, generator=draw) > 0.3
    logp, ref = torch.randn(2, 3, 6, 3, generator=draw, dtype=dtype)
    more = some_inputs(6, 3, dtype)
    pairs = [(b, "none") for b in BASELINES] + [("none", s) for s in SCALES]
    for baseline, scale in pairs:
        if not exclude_each_other(baseline, scale, returns):
            e = Estimator(
                baseline=baseline,
                scale=scale,
                returns=returns,
                beta=0.1,
                gamma=0.9,
                optimal_form="cumulative",
            )

            def policy(r, m, v, lp, rf, e=e):
                got = e.advantages(
                    r,
                    m,
                    group_size=3,
                    valid=v,
                    logprobs=lp,
                    ref_logprobs=rf,
                    **more,
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
    for fields, words in (
        ({"baseline": "remax"}, "greedy_rewards"),
        ({"baseline": "optimal"}, "score_norms"),
        ({"baseline": "value"}, "values"),
        ({"returns": "gae"}, "values"),
        ({"overlong_buffer": 2}, "max_length"),
        ({"scale": "loo_std"}, "leaves only one"),
    ):
        with pytest.raises(Refused, match=words):
            Estimator(**fields).advantages(four, mask, group_size=2)
    with pytest.raises(Refused, match="step has one"):
        Estimator(scale="other_groups_std").advantages(four, mask, group_size=4)
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


def test_the_spread_of_equal_others_is_exactly_zero() -> None:
    rewards, mask = torch.tensor([1.0, 0.1, 0.1, 0.1]), torch.ones(4, 1)
    for scale, size in (("loo_std", 4), ("other_groups_std", 2)):
        e = Estimator(scale=scale, scale_eps=1e-6)
        got = e.advantages(rewards, mask, group_size=size).policy
        plain = Estimator().advantages(rewards, mask, group_size=size).policy
        torch.testing.assert_close(got[0], plain[0] / 1e-6, rtol=1e-6, atol=0)
        with pytest.raises(Refused, match=f"{scale}.*Give a scale_eps above 0"):
            dataclasses.replace(e, scale_eps=0.0)


def test_a_baseline_of_your_own_may_change_its_arguments_in_place() -> None:
    def greedy(totals, *, group_size, mask, valid):
        mask.zero_(), valid.zero_()
        return totals.mul_(2.0) * 0

    rewards, mask = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, 2)
    got = Estimator(baseline=greedy).advantages(rewards, mask, group_size=2).policy
    assert got.tolist() == rewards.tolist() == [1.0, 2.0, 3.0, 4.0]


CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def test_equal_lengths_make_opo_a_plain_mean() -> None:
    rewards = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    mask = torch.ones(6, 4)
    for loo, twin in ((True, "rloo"), (False, "group_mean")):
        a = Estimator(baseline="opo", leave_one_out=loo).advantages(rewards, mask, group_size=3).policy
        b = Estimator(baseline=twin).advantages(rewards, mask, group_size=3).policy
        torch.testing.assert_close(a, b, **CLOSE)


def test_opo_and_optimal_by_hand() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    opo = Estimator(baseline="opo").advantages(rewards, mask, group_size=3).policy
    torch.testing.assert_close(opo, torch.tensor([1 - 16 / 5, 2 - 13 / 4, 4 - 5 / 3]))
    norms = torch.tensor([[1.0, 9, 9], [2, 3, 9], [4, 5, 6]])  # 9 is padding
    e = Estimator(baseline="optimal", returns="reward_to_go", optimal_form="per_timestep")
    each = e.advantages(rewards, mask, group_size=3, score_norms=norms).policy
    # at t = 0 the others; at t = 1 the other one that still acts; at t = 2 no row acts, so the last such mean
    wanted = [[1 - 20 / 6, 0, 0], [2 - 17 / 5, 2 - 4, 0], [4 - 5 / 3, 4 - 2, 4 - 2]]
    torch.testing.assert_close(each, torch.tensor(wanted))
    e = Estimator(baseline="optimal", returns="reward_to_go", optimal_form="cumulative", leave_one_out=False)
    each = e.advantages(rewards, mask, group_size=3, score_norms=norms).policy
    wanted = [[1 - 21 / 7, 0, 0], [2 - 3, 2 - 46 / 14, 0], [4 - 3, 4 - 46 / 14, 0]]
    torch.testing.assert_close(each, torch.tensor(wanted))


def test_shrinkage_mixes_two_means_that_leave_the_row_out() -> None:
    rewards = torch.tensor([1.0, 3.0, 10.0, 14.0, 5.0, 5.0], dtype=torch.double)
    mask = torch.ones(6, 2)
    e = Estimator(baseline="shrinkage", shrinkage_weight=0.25)
    got = rewards - e.advantages(rewards, mask, group_size=2).policy
    loo, elsewhere = [3, 1, 14, 10, 5, 5], [8.5, 8.5, 3.5, 3.5, 7, 7]
    wanted = [0.25 * a + 0.75 * b for a, b in zip(loo, elsewhere, strict=True)]
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.double))


def test_the_weight_of_shrinkage_comes_from_the_other_prompts() -> None:
    def shrunk(totals):
        e, mask = Estimator(baseline="shrinkage"), torch.ones(totals.numel(), 1)
        return totals - e.advantages(totals.flatten(), mask, group_size=5).policy.reshape(totals.shape)

    totals = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    totals = totals + torch.arange(4)[:, None]
    baselines = shrunk(totals)
    others = totals[1:]
    within, means = others.var(1).mean(), others.mean(1)
    between = (means.var() - within / 5).clamp(min=0)
    lam = between / (between + within / 4)
    assert 0.2 < lam < 1
    wanted = lam * (totals[0].sum() - totals[0]) / 4 + (1 - lam) * means.mean()
    torch.testing.assert_close(baselines[0], wanted, **CLOSE)
    for i in range(20):  # a row's own return plays no part, that of every other row does
        moved = totals + torch.nn.functional.one_hot(torch.tensor(i), 20).reshape(4, 5)
        change = (shrunk(moved) - baselines).flatten().abs()
        assert change[i] < 1e-14 and (change > 1e-6).sum() == 19
    alike = torch.zeros(4, 5, dtype=torch.double)
    alike[:, 0], alike[:, 1] = 1, -1  # equal means of all prompts
    torch.testing.assert_close(shrunk(alike + 3), torch.full((4, 5), 3.0, dtype=torch.double))
