"""Advantages of turns: against a second implementation by loops, and what one turn per row leaves."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest
import torch

import tokenrl.lab.exact.turns as turns_module
from tokenrl.core import Estimator
from tokenrl.core.choices import AXES, CHOICES
from tokenrl.errors import Refused
from tokenrl.lab import exact_moments, measure_bias, named_estimators, turn_problems
from tokenrl.lab.exact.verdict import Claim

N, T, K, SIZE = 8, 9, 3, 4
"""Rows, positions and turns of a step, and rows of a group."""


def a_step(seed=0, turns=K):
    """Rows of one to `turns` turns with gaps between them, and every input; off the mask these are junk."""
    draw = torch.Generator().manual_seed(seed)
    mask, number = (
        torch.zeros(N, T, dtype=torch.bool),
        torch.randint(-9, 99, (N, T), generator=draw),
    )
    for i in range(N):
        position = i % min(turns, 2)
        for k in range(i % turns + 1):
            actions = int(torch.randint(1, 3, (1,), generator=draw))
            mask[i, position : position + actions], number[i, position : position + actions] = (
                True,
                k,
            )
            position += actions + int(torch.randint(0, 2, (1,), generator=draw))
    random = torch.randn(4, N, T, generator=draw, dtype=torch.double)
    names = ("logprobs", "ref_logprobs", "values")
    inputs = dict(zip(names, random[1:], strict=True)) | {"score_norms": random[1].abs()}
    inputs = {name: x.masked_fill(~mask, torch.nan) for name, x in inputs.items()}
    inputs |= {
        "greedy_rewards": torch.randn(N, generator=draw, dtype=torch.double),
        "baseline_value": 0.4,
    }
    return {"rewards": random[0], "mask": mask, "turns": number, "group_size": SIZE, **inputs}


def by_loops(step, column, *, first=False):
    """Sum a column [N, T] over each turn; the reward of a position belongs to the turn that began last."""
    x, mask, turns = step[column], step["mask"], step["turns"]
    sums, reached = torch.zeros(N, K, dtype=torch.double), torch.zeros(N, K, dtype=torch.bool)
    for i in range(N):
        latest = 0
        for t in range(T):
            begins = bool(mask[i, t]) and not reached[i, turns[i, t]]
            latest = int(turns[i, t]) if mask[i, t] else latest
            reached[i, latest] |= bool(mask[i, t])
            counts = begins if first else bool(mask[i, t]) or column == "rewards"
            sums[i, latest] += x[i, t] if counts else 0.0
    return sums, reached


def tokens_of(step, by_turn):
    """Give each token the number of its turn, by a loop."""
    spread = torch.zeros(N, T, dtype=torch.double)
    for i, t in step["mask"].nonzero().tolist():
        spread[i, t] = by_turn[i, step["turns"][i, t]]
    return spread


def allowed(baseline, scale, returns):
    if returns == "total":
        return "episode" not in baseline + scale
    return returns != "episode_normalized" or CHOICES["baseline"][baseline].any_units


@pytest.mark.parametrize("returns", AXES["returns"])
@pytest.mark.parametrize("baseline", AXES["baseline"])
@pytest.mark.parametrize("scale", ["none", "group_std", "token_whiten", "episode_std"])
def test_a_turn_is_a_step_in_time(baseline, scale, returns) -> None:
    """The same numbers as from the rewards, values and score norms [N, K] of turns, summed by loops."""
    if not allowed(baseline, scale, returns):
        return
    step = a_step()
    step["valid"] = torch.arange(N) != 5
    estimator = Estimator(
        baseline=baseline, scale=scale, returns=returns, gamma=0.9, lam=0.8, window=1
    )
    rewards, reached = by_loops(step, "rewards")
    inputs = {
        name: step[name] for name in ("group_size", "greedy_rewards", "baseline_value", "valid")
    }
    inputs |= {
        "values": by_loops(step, "values", first=True)[0],
        "score_norms": by_loops(step, "score_norms")[0],
    }
    wanted = estimator.advantages(rewards, reached, **inputs)
    result = estimator.advantages(**step)
    policy = wanted.policy[:, None].expand(N, K) if wanted.policy.ndim == 1 else wanted.policy
    rows = result.policy[:, None] * step["mask"] if result.policy.ndim == 1 else result.policy
    torch.testing.assert_close(rows, tokens_of(step, policy))
    torch.testing.assert_close(result.returns * step["mask"], tokens_of(step, wanted.returns))


def test_reward_to_go_of_turns_by_hand() -> None:
    """A reward after a turn belongs to it, one before the first action to the first turn."""
    mask = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 0, 0, 0, 0, 0]])
    turns = torch.tensor([[7, 0, 0, 7, 1, 7], [0, 5, 5, 5, 5, 5]])
    rewards = torch.tensor([[1, 0, 2, 4, 8, 16], [32, 0, 64, 0, 0, 0]]).double()
    inputs = {"group_size": 2, "turns": turns, "bootstrap": torch.tensor([100.0, 0.0]).double()}
    result = Estimator(returns="reward_to_go", baseline="none", gamma=0.5).advantages(
        rewards, mask, **inputs
    )
    second = 24 + 0.5 * 100
    first = 7 + 0.5 * second
    wanted = torch.tensor([[0, first, first, 0, second, 0], [96, 0, 0, 0, 0, 0]]).double()
    torch.testing.assert_close(result.policy, wanted)
    window = Estimator(returns="blame_window", window=1, baseline="rloo").advantages(
        rewards, mask, **inputs
    )
    torch.testing.assert_close(
        window.policy[0], torch.tensor([0.0, 7 - 96, 7 - 96, 0, 124 - 96, 0]).double()
    )


def test_what_is_added_to_the_rewards_is_added_to_tokens() -> None:
    """A KL in the reward, and the penalty on long rows by the number of their tokens."""
    step = a_step(1)
    fields = {
        "beta": 0.3,
        "overlong_buffer": 4,
        "returns": "reward_to_go",
        "baseline": "timestep_mean",
    }
    result = Estimator(**fields).advantages(**step, max_length=6)
    kl = torch.where(step["mask"], step["logprobs"] - step["ref_logprobs"], 0.0)
    lengths = step["mask"].sum(-1)
    penalty = -((lengths - 2) / 4).clamp(0, 1).double()
    last = [int(row.nonzero().max()) for row in step["mask"]]
    rewards = step["rewards"] - 0.3 * kl
    rewards[torch.arange(N), last] += penalty
    plain = Estimator(returns="reward_to_go", baseline="timestep_mean")
    wanted = plain.advantages(**{**step, "rewards": rewards})
    torch.testing.assert_close(result.policy, wanted.policy)
    assert (result.policy - plain.advantages(**step).policy).abs().max() > 0.05


@pytest.mark.parametrize("baseline", [name for name in AXES["baseline"] if "episode" not in name])
def test_returns_total_ignore_turns_and_one_turn_has_the_total(baseline) -> None:
    step = a_step(2, turns=1)
    numbers = step.pop("turns")
    total = Estimator(baseline=baseline, scale="group_std")
    without, result = total.advantages(**step), total.advantages(**step, turns=numbers)
    assert torch.equal(without.policy, result.policy) and torch.equal(
        without.returns, result.returns
    )
    if baseline in ("opo", "optimal", "value"):  # lengths, norms and values are those of turns
        return
    to_go = Estimator(baseline=baseline, scale="group_std", returns="reward_to_go")
    by_row = to_go.advantages(**step, turns=numbers).policy
    first = without.policy[:, 0] if without.policy.ndim == 2 else without.policy
    torch.testing.assert_close(by_row, first[:, None] * step["mask"])


def test_components_and_loss_terms_have_turns_too() -> None:
    """Each function's reward is at the last action, so every turn of a row has its whole reward to go."""
    step = a_step(3)
    inputs = {name: step[name] for name in ("group_size", "turns")}
    components = torch.randn(N, 2, dtype=torch.double)
    estimator = Estimator(components="separate", baseline="timestep_mean", returns="reward_to_go")
    parts = [Estimator(baseline="timestep_mean", returns="reward_to_go") for _ in range(2)]
    wanted = sum(
        p.advantages(x, step["mask"], **inputs).policy
        for p, x in zip(parts, components.T, strict=True)
    )
    separate = {**inputs, "components": components}
    result = estimator.advantages(step["rewards"], step["mask"], **separate).policy
    torch.testing.assert_close(result, wanted)
    terms = estimator.loss_terms(step["rewards"], step["mask"], max_length=T, **separate)
    assert torch.equal(terms.advantages, result)
    assert not torch.allclose(
        estimator.advantages(
            step["rewards"], step["mask"], group_size=SIZE, components=components
        ).policy,
        wanted,
    )


def test_a_function_of_the_users_own_gets_turns() -> None:
    """It gets the rewards and the mask of turns, so that every advantage A is `to_go - (to_go - A)`."""
    step, seen = a_step(4), {}
    step["valid"] = torch.arange(N) != 2

    def own(totals, *, rewards, mask, **rows):
        seen.update(totals=totals, rewards=rewards, mask=mask)
        return rewards.flip(-1).cumsum(-1).flip(-1) - 3 * rewards

    result = Estimator(baseline=own, returns="reward_to_go").advantages(**step).policy
    rewards, reached = by_loops(step, "rewards")
    valid = step["valid"][:, None]
    torch.testing.assert_close(seen["rewards"][:, :K], rewards * valid)
    assert torch.equal(seen["mask"][:, :K], reached & valid) and not seen["mask"][:, K:].any()
    torch.testing.assert_close(result, tokens_of(step, 3 * rewards * valid))
    tokens = step["rewards"] * valid
    del step["turns"]
    Estimator(baseline=own, returns="reward_to_go").advantages(**step)
    torch.testing.assert_close(seen["rewards"], tokens)
    narrow = Estimator(baseline=lambda totals, **rows: totals[:1])
    with pytest.raises(Refused, match="one per token or turn"):
        narrow.advantages(**step)


@pytest.mark.parametrize("returns", AXES["returns"])
def test_vmap_agrees_with_a_loop(returns) -> None:
    steps = [a_step(seed) for seed in range(3)]
    columns = {
        k: torch.stack([s[k] for s in steps]) for k in ("rewards", "mask", "turns", "values")
    }
    baseline = "value" if returns == "episode_normalized" else "timestep_mean"
    estimator = Estimator(returns=returns, baseline=baseline, gamma=0.9)
    together = torch.vmap(lambda step: estimator.advantages(**step, group_size=SIZE).policy)(
        columns
    )
    for alone, step in zip(together, steps, strict=True):
        assert torch.equal(alone, estimator.advantages(**step).policy)


PROBLEM = replace(turn_problems()[0], group_size=2)


def test_problems_of_turns_are_complete() -> None:
    """All rows are listed, an answer of the environment is no action, and the score has mean zero."""
    assert len({problem.rewards for problem in turn_problems()}) == 12
    for problem in turn_problems():
        chances, mask = problem.chances, problem.mask.bool()
        assert float(chances.sum()) == pytest.approx(1, abs=1e-12)
        assert float(torch.einsum("pm,pmtd->d", chances, problem.scores).abs().max()) < 1e-12
        second = (mask & (problem.turns == 1)).any(-1)
        starts = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
        assert (
            torch.equal(starts.sum(-1) == 2, second)
            and 0.05 < float(chances[:, second].sum()) < 0.95
        )
        gaps = [int((~row[: row.nonzero().max()]).sum()) for row in mask]
        assert gaps == [3 if x else 0 for x in second.tolist()]
        assert int((problem.rewards != 0).sum()) == len(mask) + int(second.sum())


CATALOGUE = named_estimators()


@pytest.mark.parametrize("returns", [None, "reward_to_go"])
@pytest.mark.parametrize("name", CATALOGUE)
def test_what_is_declared_holds_for_turns(name, returns) -> None:
    """The catalogue on rows of two turns: no bias where none is declared, and a bias where one is."""
    estimator = CATALOGUE[name]
    if returns is not None:
        if estimator.returns != "total" or estimator.objective != "reward":
            return
        estimator = replace(estimator, returns=returns)
    separate = estimator.components == "separate"
    problem = (
        replace(PROBLEM, rewards=PROBLEM.totals.abs())
        if separate or estimator.objective != "reward"
        else PROBLEM
    )
    size = max(3 if estimator.scale == "loo_std" else 2, min(estimator.fewest_rows, 3))
    try:
        found = exact_moments(estimator, problem, group_size=size).status
    except Refused:  # one prompt, or a group of more than three
        assert "other_groups_std" in estimator.scale or estimator.fewest_rows > 3
        return
    declared = estimator.bias_status
    assert Claim("biased" if declared == "asymptotic" else declared, found).ok, (declared, found)


def test_a_function_of_turns_is_measured() -> None:
    """The reward to go minus that of the others is exact, and with the row itself inside it is not."""

    def mean(totals, *, rewards, mask, one_out, **rows):
        to_go = rewards.flip(-1).cumsum(-1).flip(-1) * mask
        count = mask.sum(0) - one_out * mask.long()
        return (to_go.sum(0) - one_out * to_go) / count.clamp(min=1)

    for one_out, status in ((0, "asymptotic"), (1, "exact")):
        own = Estimator(
            returns="reward_to_go", baseline=lambda *x, n=one_out, **of: mean(*x, **of, one_out=n)
        )
        assert measure_bias(own, turn_problems()[:2]).found == status
    done = doctest.testmod(turns_module)
    assert done.attempted >= 4 and done.failed == 0


def practice(name, rewards, spans):
    """The advantage of turn k of row i by its definition, from rewards and spans of the turns of each row."""
    totals, rows = [sum(row) for row in rewards], range(len(rewards))
    counts = {
        "the row's chosen and environment tokens": lambda i, k: spans[i][-1][1],
        "the row's number of turns": lambda i, k: len(spans[i]),
        "mean within each turn, summed over turns": lambda i, k: spans[i][k][1] - spans[i][k][0],
        "the same and the environment's": lambda i, k: sum(row[-1][1] for row in spans) / len(rows),
    }

    def mean(numbers):
        return sum(numbers) / len(numbers) if numbers else 0.0

    def advantage(i, k):
        if name in counts:
            return (totals[i] - mean([totals[j] for j in rows if j != i])) / counts[name](i, k)
        if "sample" in name or "leave out" in name:
            own = {"every turn a sample of its own, own mean": ()}.get(name, [(i, k)])
            own = [(i, u) for u in range(2)] if "whole row" in name else own
            every = [(j, u) for j in rows for u in range(len(rewards[j]))]
            return totals[i] - mean([totals[j] for j, u in every if (j, u) not in own])
        last = 2 if "not reached" in name else len(rewards[i])
        others = [j for j in rows if j != i or "own mean" in name]
        at = {
            u: [row[u] if u < len(row) else 0.0 for row in (rewards[j] for j in others)]
            for u in range(2)
        }
        if "not reached" not in name:
            at = {u: [rewards[j][u] for j in others if u < len(rewards[j])] for u in range(2)}
        return sum(rewards[i][k:]) - sum(mean(at[u]) for u in range(k, last))

    return advantage


OWN_ROWS = [
    *("each turn minus the own mean of that index, then summed", "the same with LOO"),
    *(
        "the same with LOO, a turn not reached counted as 0",
        "every turn a sample of its own, own mean",
    ),
    *("the same, leave out the turn only", "the same, leave out the whole row"),
    *("the row's chosen and environment tokens", "the row's number of turns"),
    *("mean within each turn, summed over turns", "the same and the environment's"),
]


@pytest.mark.parametrize("name", OWN_ROWS)
def test_practices_of_toolkits_against_their_definitions(name) -> None:
    lines = {
        key: fields for table in turns_module.COMPARED.values() for key, fields in table.items()
    }
    problem, divisor = (
        turn_problems()[1],
        name in turns_module.COMPARED["divisor, with RLOO on totals"],
    )
    draw = torch.Generator().manual_seed(7)
    for chosen in torch.randint(len(problem.mask), (20, 3), generator=draw):
        mask, turns, tokens = (
            problem.mask[chosen].bool(),
            problem.turns[chosen],
            problem.rewards[0, chosen],
        )
        of_row = [sorted(set(turns[i][mask[i]].tolist())) for i in range(3)]
        inside = [
            [(mask[i] & (turns[i] == k)).nonzero().flatten() for k in of_row[i]] for i in range(3)
        ]
        spans = [[(int(x.min()), int(x.max()) + 1) for x in row] for row in inside]
        rewards = [[float(tokens[i, x].sum()) for x in row] for i, row in enumerate(inside)]
        of_turns = {} if divisor else {"turns": turns}
        result = Estimator(**lines[name]).advantages(tokens, mask, group_size=3, **of_turns).policy
        result = result[:, None] * mask if result.ndim == 1 else result
        wanted, advantage = torch.zeros_like(result), practice(name, rewards, spans)
        for i, row in enumerate(inside):
            for k, positions in enumerate(row):
                wanted[i, positions] = advantage(i, k)
        torch.testing.assert_close(result, wanted)
