"""Compares advantages and divisors on problems of two turns, between which an environment answers.

Only the policy's tokens are actions. What toolkits do and no `Estimator` computes is written as a baseline b
of the user's own, so that the advantage is the return minus b; the rows of a step are one group.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.core.baselines import rloo, weighted_mean
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import TO_GO
from tokenrl.core.returns import Turns, at_last_action, reward_to_go
from tokenrl.core.rows import zero_outside
from tokenrl.lab.exact.enumeration import TOLERANCE, exact_moments
from tokenrl.lab.exact.problems import Completions, Problem, tabular_problem
from tokenrl.lab.exact.verdict import worst
from tokenrl.runs.output import rich_console, rich_table

ENDS = ("0", "20", "22")
"""Turns that end their row, as texts of tokens."""
CALLS = ("1", "21")
"""Turns that call the tool."""
ANSWERS = ("012", "210")
"""Answers of the environment."""
WIDTH = 7
"""The most tokens of a row: two turns of two tokens, and an answer of three."""


def turn_problem(seed: int) -> Problem:
    """Make a problem of at most two turns, with a random policy, random rewards and groups of three.

    A turn has one or two of three tokens: one ends the row, one calls a tool. A first turn that calls the
    tool has the reward 0.3; the environment draws one of two answers of three tokens, and the policy writes a
    second turn. Each row has a random reward at its last action, too.
    """
    rows = [*ENDS, *map("".join, product(CALLS, ANSWERS, ENDS + CALLS))]
    position = torch.arange(WIDTH)
    length = torch.tensor([[len(row)] for row in rows])
    first = torch.tensor([[len(row) if row in ENDS else row.index("1") + 1] for row in rows])
    is_first = position < first
    is_second = (position >= first + 3) & (position < length)
    answered = length > first
    mask = is_first | is_second
    problem = tabular_problem(
        seed, name=f"two turns, seed {seed}", group_size=3, length=4, rows=_listed(rows, mask)
    )
    last_of_first = position == first - 1
    called = answered & last_of_first
    return replace(
        problem,
        rewards=problem.rewards[..., None] * at_last_action(mask) + 0.3 * called,
        environment=1 - 0.5 * answered.double().T,
        turns=(position >= first).long(),
    )


def _listed(rows: list[str], mask: Tensor) -> Completions:
    """Return rows, each a text of digits, with the index of the text before each action."""
    ids = []
    before = []
    for row, actions in zip(rows, mask.tolist(), strict=True):
        ids.append([int(token) for token in row.ljust(WIDTH, "0")])
        before += [row[:t] if actions[t] else "" for t in range(WIDTH)]
    prefixes = sorted(set(before))
    ranks = torch.tensor([prefixes.index(text) for text in before])
    return Completions(torch.tensor(ids), mask.double(), ranks.reshape(mask.shape), prefixes)


@cache
def turn_problems() -> tuple[Problem, ...]:
    """Return twelve random problems of two turns, on which advantages of turns can be measured.

    Example:
        A baseline of your own gets the totals [N] of rows, and rewards and mask [N, K] of turns. Here the
        advantage is the sum over the turns to come of the reward minus the mean reward at that turn:

        >>> from tokenrl import Estimator
        >>> from tokenrl.lab import measure_bias, turn_problems
        >>> def means(totals, *, rewards, mask, group_size, valid):
        ...     mean = (rewards * mask).sum(0) / mask.sum(0).clamp(min=1)
        ...     return (mean * mask).flip(-1).cumsum(-1).flip(-1)
        >>> estimator = Estimator(returns="reward_to_go", baseline=means)
        >>> verdict = measure_bias(estimator, problems=turn_problems()[:3])
        >>> verdict.found, round(verdict.relative_bias, 2)
        ('biased', 0.5)
    """
    return tuple(map(turn_problem, range(12)))


def sum_of_means(
    totals: Tensor,
    *,
    rewards: Tensor,
    mask: Tensor,
    leave_one_out: bool = True,
    absent_count: bool = False,
    **_: Any,
) -> Tensor:
    """Return the sum over this and later turns of the mean reward at each turn [N, K].

    The mean is over the rows that reach the turn, or with `absent_count` over all rows.
    """
    reached = (mask | absent_count).T
    means, defined = weighted_mean(
        rewards.T, reached, reached.double(), leave_one_out=leave_one_out
    )
    return reward_to_go(zero_outside(means, defined & reached).T)


def mean_of_turns(totals: Tensor, *, mask: Tensor, left_out: int, **_: Any) -> Tensor:
    """Return the mean of the totals over all turns of the step, less so many of the row's own turns [N]."""
    turns = mask.sum(-1)
    excluded = turns.clamp(max=left_out)
    return ((turns * totals).sum() - excluded * totals) / (turns.sum() - excluded)


def divided(totals: Tensor, *, mask: Tensor, valid: Tensor, by: str, **_: Any) -> Tensor:
    """Return the baseline [N, T] with which the advantage is RLOO's, divided by a count of tokens."""
    begins = mask & ~pad(mask[:, :-1], (1, 0))
    if by == "turns":
        count = begins.sum(-1, keepdim=True)
    elif by == "turn":
        turns = Turns.read(begins.cumsum(-1) - 1, mask)
        count = turns.spread(turns.sums(mask.double()))
    else:  # the tokens of the row, the environment's too, or their mean over the group
        count = at_last_action(mask).double().argmax(-1, keepdim=True) + 1.0
        if by == "group":
            count = count.mean(0, keepdim=True)
    advantages = (totals - rloo(totals, valid))[:, None] / count.expand_as(mask).clamp(min=1)
    return totals[:, None] - advantages


TIMESTEP: dict[str, Any] = {**TO_GO, "baseline": "timestep_mean"}
OWN: dict[str, Any] = {**TO_GO, "baseline": partial(sum_of_means, leave_one_out=False)}
OTHERS: dict[str, Any] = {**TO_GO, "baseline": sum_of_means}
ALL: dict[str, Any] = {**TO_GO, "baseline": partial(sum_of_means, absent_count=True)}
COMPARED: dict[str, dict[str, dict[str, Any]]] = {
    "advantage of a turn's tokens": {
        "the row's total, RLOO": {},
        "to go, minus the LOO of totals": TO_GO,
        "to go, minus the LOO per turn index": TIMESTEP,
        "to go, minus the own mean per turn index": {**TIMESTEP, "leave_one_out": False},
        "each turn minus the own mean of that index, then summed": OWN,
        "the same with LOO": OTHERS,
        "the same with LOO, a turn not reached counted as 0": ALL,
        "the own turn's reward only, LOO": {**TIMESTEP, "returns": "blame_window", "window": 1},
        "every turn a sample of its own, own mean": {
            "baseline": partial(mean_of_turns, left_out=0)
        },
        "the same, leave out the turn only": {"baseline": partial(mean_of_turns, left_out=1)},
        "the same, leave out the whole row": {"baseline": partial(mean_of_turns, left_out=2)},
    },
    "divisor, with RLOO on totals": {
        "the row's chosen tokens": {"aggregation": "sequence_mean"},
        "the row's chosen and environment tokens": {"baseline": partial(divided, by="row")},
        "the row's number of turns": {"baseline": partial(divided, by="turns")},
        "mean within each turn, summed over turns": {"baseline": partial(divided, by="turn")},
        "all chosen tokens of the group": {"aggregation": "token_mean"},
        "the same and the environment's": {"baseline": partial(divided, by="group")},
    },
}
"""The rows of the two tables: fields changed from RLOO."""
EXPLANATION = (
    "12 random problems, groups of 3. A turn has one or two of three tokens: one ends the row, one calls a "
    "tool. A first turn that calls it has a reward of 0.3, the environment draws one of two answers of three "
    "tokens, and the policy writes a second turn. Each row has a random reward at its end. To go: rewards "
    "from this turn on; LOO: the mean of the other rows. Bias: |E g - grad J| / |grad J|, a wrong scale "
    "included, the median and the worst; cosine: of E g and grad J, the least. Status: for this group size."
)


def compare_turns() -> list[dict[str, Any]]:
    """Measure everything in `COMPARED` on `turn_problems`, and print its tables; one record for each line."""
    console = rich_console(width=120)
    records = []
    for head, lines in COMPARED.items():
        problems = turn_problems()
        if "divisor" in head:  # it counts tokens, so its function has to get the mask of tokens
            problems = tuple(replace(problem, turns=None) for problem in problems)
        table = rich_table("", (head, "status"), ("bias", "worst", "cosine"), no_wrap=True)
        for name, fields in lines.items():
            moments = [exact_moments(Estimator(**fields), problem) for problem in problems]
            biases = [m.relative_bias for m in moments]
            status = worst(*(m.status for m in moments))
            numbers = {
                "relative_bias": median(biases),
                "worst_relative_bias": max(biases),
                "cosine": min(m.cosine for m in moments),
            }
            cells = ["0" if x < TOLERANCE else f"{x:.3f}" for x in numbers.values()]
            table.add_row(name, status, *cells)
            records.append({"of": head, "name": name, "status": status, **numbers})
        console.print(table)
    console.print(EXPLANATION)
    return records
