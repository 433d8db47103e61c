"""Makes problems of two turns, between which an environment answers. Only the policy's tokens are actions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from tokenrl.core.returns import at_last_action
from tokenrl.lab.exact.problems import Completions, Problem, tabular_problem

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
