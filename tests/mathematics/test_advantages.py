"""Baselines, scales and returns: formulas by hand, exact zeros, abstentions, and that they run under vmap."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from drawing import normals, seeded
from hypothesis import given, settings, strategies as st
from refusals import refused
from torch.testing import assert_close

from tokenrl.core import Estimator
from tokenrl.core.choices import CHOICES
from tokenrl.core.memories import RunningMean
from tokenrl.core.refusals import LEAST_EPS

BASELINES, SCALES = CHOICES["baseline"], CHOICES["scale"]
MEANS = ("batch_mean", "group_mean", "rloo", "opo", "optimal", "shrinkage", "timestep_mean")
ROWWISE = ("none", "group_std", "batch_std", "loo_std", "token_whiten")
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
    names = (
        "valid",
        "logprobs",
        "ref_logprobs",
        "values",
        "greedy_rewards",
        "score_norms",
        "bootstrap",
    )
    extra = {k: fields.pop(k) for k in names if k in fields}
    if fields.get("baseline") == "optimal":
        extra.setdefault("score_norms", torch.ones_like(mask, dtype=rewards.dtype))
    e = Estimator(**fields)
    return e.advantages(
        rewards, mask, group_size=size, baseline_value=baseline_value, **extra
    ).policy


def some_inputs(n, t, dtype=torch.double):
    """Every input that a baseline may need."""
    draw = seeded(n)
    return {
        "values": torch.randn(n, t, generator=draw, dtype=dtype),
        "greedy_rewards": torch.randn(n, generator=draw, dtype=dtype),
        "score_norms": torch.rand(n, t, generator=draw, dtype=dtype),
        "logprobs": -torch.rand(n, t, generator=draw, dtype=dtype),
    }


@quick
@given(steps())
def test_means_against_their_definitions(rewards):
    size, flat = rewards.shape[1], rewards.reshape(-1)
    subtracted = {
        "none": 0.0,
        "constant": 2.0,
        "running_mean": 0.5,
        "batch_mean": flat.mean(),
        "group_mean": rewards.mean(1).repeat_interleave(size),
        "rloo": torch.stack([(row.sum() - r) / (size - 1) for row in rewards for r in row]),
    }
    for baseline, mean in subtracted.items():
        policy = advantages(rewards, baseline=baseline, baseline_constant=2.0)
        assert_close(policy, flat - mean, rtol=1e-9, atol=1e-9)


@quick
@given(steps(), st.sampled_from([0, 1]), st.sampled_from([0.01, 0.3]))
def test_scales_against_their_definitions(rewards, ddof, eps):
    if rewards.std(1).min() < 1e-6:
        return
    flat = rewards.reshape(-1)
    rows = torch.arange(len(flat))
    group = rows // rewards.shape[1]
    same = group[:, None] == group
    compared = {
        "group_std": same,
        "batch_std": same | True,
        "loo_std": same & (rows[:, None] != rows),
    }
    wanted = {
        scale: flat / (torch.stack([flat[row].std(correction=ddof) for row in others]) + eps)
        for scale, others in compared.items()
        if others.sum(1).min() > 1
    }
    lengths = rows % 3 + 1
    tokens = flat.repeat_interleave(lengths)
    wanted["token_whiten"] = (flat - tokens.mean()) / (tokens.std(correction=ddof) + eps)
    inputs = {"mask": torch.arange(3) < lengths[:, None], "group_size": rewards.shape[1]}
    for scale, expected in wanted.items():
        fields = {"baseline": "none", "scale": scale, "scale_ddof": ddof, "scale_eps": eps}
        assert_close(advantages(flat, **inputs, **fields), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("baseline", MEANS)
@pytest.mark.parametrize("scale", ROWWISE)
def test_equal_rewards_give_exactly_zero(baseline, scale):
    """In any precision, with as little eps as may be, also where the first row of each group abstains."""
    eps = LEAST_EPS if SCALES[scale].of_others else 1e-30
    numbers = torch.cat([torch.arange(1, 100) / 100, torch.arange(1, 100)])
    for dtype, size in product((torch.float32, torch.float64, torch.bfloat16), (4, 7, 16)):
        values = numbers.to(dtype)
        rewards, mask = values[:, None].expand(-1, 2 * size), torch.ones(2 * size, 3)
        for valid in (torch.ones(2 * size).bool(), torch.arange(2 * size) % size > 0):
            fields = {"baseline": baseline, "scale": scale, "scale_eps": eps, "group_size": size}
            spoilt = rewards.masked_fill(~valid, torch.nan)
            got = torch.vmap(lambda r: advantages(r, mask=mask, valid=valid, **fields))(spoilt)  # noqa: B023
            assert (got == 0).all(), size


def exclude_each_other(baseline: str, scale: str, returns: str) -> bool:
    if scale == "target":
        return (baseline, returns) != ("none", "total")
    if returns == "total":
        return "episode" in baseline + scale
    return returns == "episode_normalized" and not CHOICES["baseline"][baseline].any_units


@pytest.mark.parametrize("baseline", BASELINES)
def test_abstaining_rows_count_nowhere(baseline):
    """Removing a row of each group gives the others the same advantages, whatever the row holds."""
    draw = seeded(5)
    rewards = normals(draw, 16)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]] * 4).double()
    inputs = some_inputs(16, 3) | {"rewards": rewards}
    valid = ~torch.eye(4, dtype=torch.bool).flatten()  # another place in each group
    spoilt = {name: x.clone() for name, x in inputs.items()}
    for x in spoilt.values():
        x[~valid] = torch.nan
    others = {name: x[valid] for name, x in inputs.items()}
    for scale, returns in product(SCALES, CHOICES["returns"]):
        if exclude_each_other(baseline, scale, returns):
            continue
        fields = {"baseline": baseline, "scale": scale, "returns": returns, "scale_eps": 0.1}
        policy = advantages(mask=mask, group_size=4, valid=valid, **fields, **spoilt)
        without = advantages(mask=mask[valid], group_size=3, **fields, **others)
        assert_close(policy[valid], without)
        assert (policy[~valid] == 0).all()


@pytest.mark.parametrize("returns", ["blame_window", "gae"])
def test_rows_are_compared_by_their_whole_returns(returns):
    """With other credits too, and lam 0 or a window of 1 credit a reward to its own action."""
    rewards = torch.tensor([[1.0, 2.0], [5.0, 3.0]])
    fields = {"returns": returns, "window": 1, "lam": 0.0, "values": torch.zeros(2, 2)}
    got = advantages(rewards, mask=torch.ones(2, 2), group_size=2, **fields)
    assert got.tolist() == [[1.0 - 8, 2.0 - 8], [5.0 - 3, 3.0 - 3]]


def returns_of(rewards, mask=None, **fields):
    """The critic's targets: what each position is credited with."""
    mask = torch.ones_like(rewards) if mask is None else mask
    e = Estimator(baseline="none", **({"returns": "reward_to_go"} | fields))
    return e.advantages(rewards, mask, group_size=None).returns.tolist()


def test_returns_by_hand():
    """A single reward is paid at the last action, or at the first position of a row without any."""
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    single, dense = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert returns_of(single, mask) == [[2, 2, 0], [3, 3, 3], [5, 0, 0]]
    assert returns_of(single, mask, gamma=0.5) == [[1, 2, 0], [0.75, 1.5, 3], [5, 0, 0]]
    assert returns_of(dense, gamma=0.5) == [[4, 6, 8, 8]]
    assert returns_of(dense, gamma=1 - 1e-7) == [pytest.approx([15, 14, 12, 8])]
    assert max(returns_of(torch.ones(1, 3000), gamma=0.5)[0]) < 3  # no power overflows
    to_go = torch.tensor([15.0, 14.0, 12.0, 8.0])
    standardised = ((to_go - to_go.mean()) / to_go.std()).tolist()
    normalised = {"returns": "episode_normalized", "scale_ddof": 1, "scale_eps": 0.0}
    assert returns_of(dense, **normalised) == [pytest.approx(standardised)]
    window = {"returns": "blame_window", "window": 2}
    assert returns_of(dense, **window) == [[3, 6, 12, 8]]
    assert returns_of(dense, **window, gamma=0.5) == [[2, 4, 8, 8]]
    assert returns_of(dense, returns="blame_window", window=9) == [[15, 14, 12, 8]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize(
    ("lam", "length_lam", "value_lam"),
    [(0.0, 0, None), (0.7, 0, None), (1.0, 0, None), (0.7, 0, 1.0), (0.7, 0.4, 0.3)],
)
def test_gae_is_a_loop_over_actions_from_the_last_to_the_first(gamma, lam, length_lam, value_lam):
    """Off the mask, also between two actions, anything may stand; beyond a row stands what follows its end."""
    rewards, values = normals(seeded(4), 2, 3, 5)
    beyond = torch.tensor([0.0, 2.0, -1.0], dtype=torch.double)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [1, 0, 0, 0, 0]]).bool()
    fields = {"lam": lam, "length_lam": length_lam, "value_lam": value_lam}
    e = Estimator(baseline="value", returns="gae", gamma=gamma, **fields)
    inputs = {"values": values.masked_fill(~mask, torch.nan), "bootstrap": beyond}
    policy, targets = e.advantages(rewards * mask, mask, group_size=None, **inputs)
    assert (policy[~mask] == 0).all()
    for row, actions in enumerate(mask):
        n = int(actions.sum())
        of_policy = max(0.0, 1 - 1 / (length_lam * n)) if length_lam else lam
        of_critic = of_policy if value_lam is None else value_lam
        for mixing, column in ((of_policy, policy + values), (of_critic, targets)):
            after = value_after = beyond[row]
            for t in reversed(range(int(actions.nonzero().max()) + 1)):
                after, value_after = gamma * after, gamma * value_after  # at each position
                if actions[t]:
                    after = rewards[row, t] + (1 - mixing) * value_after + mixing * after
                    value_after = values[row, t]
                    assert_close(column[row, t], after)


HEAVY = ("opo", "optimal", "shrinkage")


@pytest.mark.parametrize("baseline", HEAVY)
def test_a_row_with_huge_numbers_leaves_the_digits_of_its_own_baseline(baseline):
    """sum - x_i in place of the sum of the others would lose them."""
    rewards = normals(seeded(6), 9)
    norms = torch.linspace(0.1, 1, 27, dtype=torch.double).reshape(9, 3)
    mask = torch.arange(3) < torch.tensor([3, 1, 2, 2, 3, 1, 1, 3, 3])[:, None]
    fields = {"mask": mask.double(), "group_size": 3, "baseline": baseline}
    plain = rewards - advantages(rewards, score_norms=norms, **fields)
    for row in range(9):
        other, heavy = rewards.clone(), norms.clone()
        other[row] += 1e6
        heavy[row] *= 1e6
        after = other - advantages(other, score_norms=heavy, **fields)
        assert_close(after[row], plain[row], rtol=1e-7, atol=1e-7)
        assert not torch.allclose(after, plain)


def test_optimal_baselines_of_tokens_by_hand():
    """Those of whole rows are in `test_reasons.py`."""
    rewards, mask = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    norms = torch.tensor([[1.0, 9, 9], [2, 3, 9], [4, 5, 6]])  # 9 is padding
    shared = {"mask": mask, "group_size": 3, "score_norms": norms}
    shared |= {"baseline": "optimal", "returns": "reward_to_go"}
    shared["optimal_form"] = "cumulative"
    # at t = 0 the others; at t = 1 the other row that still acts; at t = 2 no row acts, so the last such mean
    wanted = [[1 - 20 / 6, 0, 0], [2 - 17 / 5, 2 - 4, 0], [4 - 5 / 3, 4 - 2, 4 - 2]]
    assert_close(advantages(rewards, **shared), torch.tensor(wanted))
    wanted = [[1 - 21 / 7, 0, 0], [2 - 3, 2 - 46 / 14, 0], [4 - 3, 4 - 46 / 14, 0]]
    assert_close(advantages(rewards, leave_one_out=False, **shared), torch.tensor(wanted))


def test_shrinkage_mixes_two_means_that_leave_the_row_out():
    """With a given weight, and with the one that the other prompts give."""
    totals = normals(seeded(3), 4, 5)
    totals = totals + torch.arange(4)[:, None]
    own = (totals[0].sum() - totals[0]) / 4
    within, means = totals[1:].var(1).mean(), totals[1:].mean(1)
    between = means.var() - within / 5
    for weight, lam in ((0.25, 0.25), (None, between / (between + within / 4))):
        policy = advantages(totals, baseline="shrinkage", shrinkage_weight=weight)[:5]
        wanted = totals[0] - lam * own - (1 - lam) * means.mean()
        assert_close(policy, wanted, rtol=1e-10, atol=1e-12)
    alike = torch.tensor([[4.0, 2.0, 3.0]] * 3)  # equal means of all prompts
    assert advantages(alike, baseline="shrinkage").tolist() == pytest.approx([1, -1, 0] * 3)


def test_a_baseline_of_the_users_own():
    """It gets copies, and returns a number a row or a token."""
    arguments = {}

    def own(totals, *, group_size, mask, valid):
        arguments.update(group_size=group_size, mask=mask.clone(), valid=valid.clone())
        mask.zero_(), valid.zero_()
        return totals.mul_(2.0).mean() / 2 + torch.zeros(len(totals))

    rewards = torch.tensor([[1.0, 2.0], [3.0, torch.nan]])
    valid = torch.tensor([True, True, True, False])
    assert advantages(rewards, baseline=own, valid=valid).tolist() == [-0.5, 0.5, 1.5, 0]
    assert rewards[0].tolist() == [1, 2] and valid.any() and arguments["group_size"] == 2
    assert torch.equal(arguments["valid"], valid)
    assert torch.equal(arguments["mask"].any(1), valid)
    by_token = {"baseline": lambda totals, mask, **_: 2.0 * mask, "returns": "reward_to_go"}
    assert advantages(rewards, **by_token).tolist()[:2] == [[-1] * 3, [0] * 3]


@pytest.mark.parametrize(
    ("fields", "size", "words"),
    [
        *(({"baseline": name}, None, "group_size is None") for name in ("rloo", "group_mean")),
        ({"baseline": "none", "scale": "group_std"}, 1, "group_size is 1"),
        ({}, 3, "multiple"),
        ({"baseline": "none", "scale": "batch_std"}, 0, "step has 1"),
        ({"scale": "loo_std", "scale_eps": 0.1}, 2, "Take 3 or more"),
        ({"scale": "loo_std"}, 8, "with 0.0001 one right answer in a group counts thousands"),
        ({"baseline": "running_mean"}, 2, "baseline_value"),
        ({"beta": 0.1}, 2, "logprobs"),
        ({"baseline": "remax"}, 2, "greedy_rewards"),
        ({"returns": "gae"}, 2, "values"),
        ({"overlong_buffer": 2}, 2, "max_length"),
    ],
    ids=str,
)
def test_inputs_that_are_missing_or_do_not_fit_are_refused(fields, size, words):
    rows = 1 if size == 0 else 4
    with refused(words):
        Estimator(**fields).advantages(
            torch.arange(rows * 1.0), torch.ones(rows, 3), group_size=size or None
        )
    with pytest.raises(ValueError, match="fit"):
        Estimator().advantages(torch.arange(2.0), torch.ones(4, 3), group_size=2)


@pytest.mark.parametrize(
    ("memory", "value", "after"),
    [
        (RunningMean(decay=0.75, initial=2.0), 0.75 * 2.25 + 0.25 * 6.0, 0.75 * 3.1875 + 2.5),
        (RunningMean(), (2 * 3 + 4 * 6) / 6, 40 / 7),
    ],
    ids=["decay", "plain"],
)
def test_running_mean(memory, value, after):
    memory.update(torch.tensor([1.0, 5.0, torch.nan]), valid=torch.tensor([True, True, False]))
    memory.update(torch.tensor([[6.0, 0.0], [4.0, 2.0], [5.0, 1.0], [6.0, 0.0]]))
    memory.update(torch.tensor([torch.nan]), torch.tensor([False]))
    assert memory.value == pytest.approx(value)
    again = RunningMean(memory.decay)
    again.load_state_dict(memory.state_dict())
    again.update(torch.tensor([10.0]))
    assert again.value == pytest.approx(after)


def test_each_reward_function_has_its_own_baseline_and_scale():
    """GDPO by hand: GRPO's advantage of each column, added with the weights; nan is left out."""
    columns = torch.tensor([[1.0, 2.0, 3.0, 6.0], [50.0, torch.nan, 10.0, 30.0]]).double()
    inputs = {
        "group_size": 4,
        "components": columns.T,
        "component_weights": torch.tensor([2, -0.5]),
    }
    e = Estimator.preset("gdpo", scale_eps=0.0)
    policy = e.advantages(columns[0], torch.ones(4, 3), **inputs).policy
    first = 2 * (columns[0] - 3) / columns[0].std()
    second = -0.5 * torch.tensor([1.0, 0.0, -1.0, 0.0]).double()
    assert_close(policy, first + second)
    with refused("components was not given"):
        e.advantages(columns[0], torch.ones(4, 3), group_size=4)


@pytest.mark.parametrize(
    "fields",
    [
        {"baseline": "running_mean"},
        {"baseline": "value"},
        {"returns": "gae"},
        {"overlong_buffer": 2},
        {"beta": 0.1},
    ],
    ids=str,
)
def test_components_need_a_baseline_made_of_their_own_rewards(fields):
    with refused(r"components 'separate' .* its own rewards"):
        Estimator(components="separate", **fields)


@pytest.mark.parametrize("returns", ["total", "reward_to_go"])
def test_a_row_left_alone_has_no_advantage(returns):
    rewards = torch.tensor([[7.0, 1, 2], [torch.nan] * 3, [1, 0, 0], [3, 0, 0]], dtype=torch.double)
    valid = torch.tensor([True, False, True, True])
    shared = {"mask": torch.ones(4, 3), "group_size": 2, "returns": returns}
    for fields in ({"baseline": "group_mean"}, {}, {"baseline": "none", "scale": "group_std"}):
        got = advantages(rewards, valid=valid, **shared, **fields)
        assert (got[:2] == 0).all() and (got[2:] != 0).any() and got.isfinite().all()
        assert (advantages(rewards * torch.nan, valid=valid & False, **shared, **fields) == 0).all()
