"""Makes a control problem so small that every trajectory can be listed, with recurring states and randomness.

The policy is a table of logits with one row per state, the same at all times, so a recurring state uses the
same parameters again. The random transitions of the environment enter the probability of a trajectory but not
its score. Trajectories end early or at a limit of steps, so their lengths differ, and they may be truncated
before the environment ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from tokenrl.lab.exact.problems import (
    Completions,
    Problem,
    greedy_completions,
    of_policy,
)
from tokenrl.settings import check_seed


class TabularMdp(NamedTuple):
    """An environment of S states and A actions, with a policy, a reference and a critic.

    The index S among the successors stands for the end of the episode.

    Attributes:
        start: Probability of each first state [S].
        transitions: Probability of each successor [S, A, S + 1].
        rewards: Reward of a step, which may depend on its successor [S, A, S + 1].
        logits: Logits of the policy [S, A].
        reference: Logits of the reference [S, A].
        guesses: Values that an untrained critic gives to the states [S].
    """

    start: Tensor  # [S]
    transitions: Tensor  # [S, A, S1]
    rewards: Tensor  # [S, A, S1]
    logits: Tensor  # [S, A]
    reference: Tensor  # [S, A]
    guesses: Tensor  # [S]


def random_mdp(seed: int, *, one_start: bool = False, even: bool = False) -> TabularMdp:
    """Draw an environment of two states; action 0 leads to either of them, action 1 to the other or the end.

    Args:
        seed: Seed of everything that is drawn.
        one_start: Always start in state 0, which halves the number of trajectories.
        even: Whether all probabilities are 1/2, also of actions, so that one step can hold every trajectory
            in exact proportion.

    Raises:
        Refused: The seed has more than 32 bits.
    """
    check_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(2, 2, 3, generator=draw, dtype=torch.double)
    logits, reference = torch.randn(2, 2, 2, generator=draw, dtype=torch.double)
    guesses = torch.randn(2, generator=draw, dtype=torch.double)
    coins = 0.3 + 0.4 * torch.rand(5, generator=draw, dtype=torch.double)
    if even:
        coins = torch.full_like(coins, 0.5)
        logits = torch.zeros_like(logits)
    first, stay_0, other_0, stay_1, other_1 = coins.tolist()
    if one_start:
        first = 1.0
    start = torch.tensor([first, 1 - first], dtype=torch.double)
    transitions = [
        [[stay_0, 1 - stay_0, 0.0], [0.0, other_0, 1 - other_0]],
        [[1 - stay_1, stay_1, 0.0], [other_1, 0.0, 1 - other_1]],
    ]
    moves = torch.tensor(transitions, dtype=torch.double)
    return TabularMdp(start, moves, rewards, logits, reference, guesses)


def all_trajectories(mdp: TabularMdp, steps: int) -> tuple[Completions, Tensor]:
    """List every trajectory of at most `steps` steps that has a positive probability.

    Returns:
        Actions and mask, with the states in place of prefixes; and the successor of each step [M, T].
    """
    end = len(mdp.start)
    moves = mdp.transitions.nonzero().tolist()  # state, action and successor

    def continued(path: list[list[int]], state: int) -> Iterator[list[list[int]]]:
        if state == end or len(path) == steps:
            yield path
            return
        for move in moves:
            if move[0] == state:
                yield from continued([*path, move], move[2])

    paths: list[list[list[int]]] = []
    for state in mdp.start.nonzero().flatten().tolist():
        paths += continued([], state)
    lengths = torch.tensor([[len(path)] for path in paths])
    padded = torch.tensor([path + [[0, 0, 0]] * (steps - len(path)) for path in paths])
    mask = torch.arange(steps) < lengths
    states, actions, successors = padded.unbind(-1)
    return Completions(actions, mask.double(), states, []), successors


def expected_rewards(mdp: TabularMdp, steps: int) -> Tensor:
    """Return the mean reward of each of the next K steps under the policy, from each state or the end [S + 1, K].

    `m_1(s) = E[r | s]` and `m_{k+1}(s) = E[m_k(s') | s]`. The value with k steps left is `sum_{j <= k} m_j(s)`.
    """
    moves = mdp.logits.softmax(-1)[:, :, None] * mdp.transitions  # [S, A, S + 1]
    mean = (moves * mdp.rewards).sum((1, 2))
    rewards = torch.zeros(len(mean) + 1, steps, dtype=torch.double)
    for step in range(steps):
        rewards[:-1, step] = mean
        mean = moves.sum(1) @ rewards[:, step]
    return rewards


def problem_of_mdp(
    mdp: TabularMdp,
    *,
    group_size: int = 2,
    steps: int = 3,
    beyond: int = 0,
    critic: Literal["true", "guess"] = "guess",
) -> Problem:
    """List every trajectory of an environment; the episodes of a step form one group.

    Args:
        mdp: The environment and the policy.
        group_size: Episodes per step.
        steps: Number of steps after which an episode is truncated.
        beyond: Number of steps for which the environment would continue after the truncation. With 0 the
            limit is part of the problem, and no reward is lost. Otherwise the estimator gets the critic's
            value of the state after a truncation.
        critic: 'true' for V^pi of the state and the steps left, 'guess' for `mdp.guesses`.

    Returns:
        The problem, with one prompt (P = 1) and M trajectories.
    """
    rows, successors = all_trajectories(mdp, steps)
    states = rows.prefix
    moves = (states, rows.ids, successors)
    chances = torch.where(rows.mask.bool(), mdp.transitions[moves], 1.0)
    environment = mdp.start[states[:, 0]] * chances.prod(-1)
    whole = steps + beyond
    mean_rewards = expected_rewards(mdp, whole)  # [S + 1, K]
    if critic == "true":  # V^pi with k steps left is the sum of k mean rewards
        columns = [mean_rewards[:, : whole - t].sum(-1) for t in range(steps + 1)]
        values = torch.stack(columns, -1)  # [S + 1, T + 1]
    else:
        values = torch.nn.functional.pad(mdp.guesses, (0, 1))[:, None].expand(-1, steps + 1)
    # A state if the trajectory was truncated, S if it ended.
    last = successors.gather(1, rows.last).squeeze(1)
    policy = of_policy(mdp.logits[None], mdp.reference[None], rows, shared=True)
    log_chances = environment.log() + policy["logprobs"].sum(-1)
    return Problem(
        name=f"control, {steps} steps of {whole}, groups of {group_size}, critic: {critic}",
        group_size=group_size,
        mask=rows.mask,
        truncated=last < len(mdp.start),
        rewards=(mdp.rewards[moves] * rows.mask)[None],
        values=(values[states, torch.arange(steps)] * rows.mask)[None],
        greedy=greedy_completions(mdp.logits[None], rows, log_chances),
        max_length=steps + 2,
        environment=environment[None],
        bootstrap=values[last, steps][None] if beyond else None,
        after=mean_rewards[last, :beyond].sum(-1)[None] if beyond else None,
        **policy,
    )
