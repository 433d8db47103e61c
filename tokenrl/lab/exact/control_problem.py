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
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.lab.exact.problems import (
    Completions,
    Problem,
    slopes_of,
    token_entropies,
    token_logprobs,
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

    start: Float[Tensor, " S"]
    transitions: Float[Tensor, "S A S1"]
    rewards: Float[Tensor, "S A S1"]
    logits: Float[Tensor, "S A"]
    reference: Float[Tensor, "S A"]
    guesses: Float[Tensor, " S"]


class Trajectories(NamedTuple):
    """State, action and successor of each step, and the mask of steps, [M, T] each; 0 outside the mask."""

    states: Int[Tensor, "M T"]
    actions: Int[Tensor, "M T"]
    successors: Int[Tensor, "M T"]
    mask: Float[Tensor, "M T"]

    @property
    def last(self) -> Int[Tensor, " M"]:
        """The last successor of each trajectory: a state if it was truncated, S if it ended."""
        return self.successors.gather(1, self.mask.sum(-1, keepdim=True).long() - 1).squeeze(1)


def random_mdp(seed: int, *, one_start: bool = False, even: bool = False) -> TabularMdp:
    """Draw an environment of two states; action 0 leads to either of them, action 1 to the other or the end.

    Args:
        seed: Seed of everything that is drawn.
        one_start: Always start in state 0, which halves the number of trajectories.
        even: Whether all probabilities, also those of actions, are 1/2, so that one step can hold every
            trajectory in exact proportion.

    Raises:
        Refused: The seed has more than 32 bits.
    """
    check_seed(seed)
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(2, 2, 3, generator=draw, dtype=torch.double)
    logits, reference = torch.randn(2, 2, 2, generator=draw, dtype=torch.double)
    guesses = torch.randn(2, generator=draw, dtype=torch.double)
    first, *coins = (0.3 + 0.4 * torch.rand(5, generator=draw, dtype=torch.double)).tolist()
    if even:
        first, coins, logits = 0.5, [0.5] * 4, torch.zeros_like(logits)
    first = 1.0 if one_start else first
    stay_0, other_0, stay_1, other_1 = coins
    transitions = [
        [[stay_0, 1 - stay_0, 0.0], [0.0, other_0, 1 - other_0]],
        [[1 - stay_1, stay_1, 0.0], [other_1, 0.0, 1 - other_1]],
    ]
    start = torch.tensor([first, 1 - first], dtype=torch.double)
    return TabularMdp(
        start, torch.tensor(transitions, dtype=torch.double), rewards, logits, reference, guesses
    )


def all_trajectories(mdp: TabularMdp, steps: int) -> Trajectories:
    """List every trajectory of at most `steps` steps that has a positive probability."""
    end, choices = len(mdp.start), mdp.logits.shape[1]
    possible = (mdp.transitions > 0).tolist()

    def grow(path: tuple[tuple[int, int, int], ...], states: list[int]) -> Iterator[tuple]:  # type: ignore[type-arg]
        if not states or len(path) == steps:
            yield path
            return
        for state in states:
            for action in range(choices):
                for after in range(end + 1):
                    if possible[state][action][after]:
                        yield from grow(
                            (*path, (state, action, after)), [after] if after < end else []
                        )

    paths = list(grow((), mdp.start.nonzero().flatten().tolist()))
    padded = torch.tensor(
        [[*path, *[(0, 0, 0)] * (steps - len(path))] for path in paths]
    )  # [M, T, 3]
    mask = torch.arange(steps) < torch.tensor([len(path) for path in paths])[:, None]
    return Trajectories(padded[..., 0], padded[..., 1], padded[..., 2], mask.double())


def expected_rewards(mdp: TabularMdp, steps: int) -> Float[Tensor, "S1 K"]:
    """Return the mean reward of each of the next `steps` steps under the policy, from each state or the end.

    `m_1(s) = E[r | s]` and `m_{k+1}(s) = E[m_k(s') | s]`. The value with k steps left is
    `sum_{j <= k} gamma^(j - 1) m_j(s)`.
    """
    moves = mdp.logits.softmax(-1)[:, :, None] * mdp.transitions  # [S, A, S + 1]
    mean = (moves * mdp.rewards).sum((1, 2))
    columns = []
    for _ in range(steps):
        columns.append(torch.nn.functional.pad(mean, (0, 1)))
        mean = moves.sum(1) @ columns[-1]
    return (
        torch.stack(columns, -1) if columns else torch.zeros(len(mean) + 1, 0, dtype=torch.double)
    )


def problem_of_mdp(
    mdp: TabularMdp,
    *,
    name: str = "",
    group_size: int = 2,
    steps: int = 3,
    beyond: int = 0,
    critic: Literal["true", "guess"] = "guess",
    gamma: float = 1.0,
    bootstrap: bool = True,
) -> Problem:
    """List every trajectory of an environment; the episodes of a step form one group.

    Args:
        mdp: The environment and the policy.
        name: Name of the problem; made from the other arguments if empty.
        group_size: Episodes per step.
        steps: Number of steps after which an episode is truncated.
        beyond: Number of steps for which the environment would continue after the truncation. With 0 the
            limit is part of the problem, and no reward is lost.
        critic: 'true' for V^pi of the state and the steps left, 'guess' for `mdp.guesses`.
        gamma: Discount of V^pi; give the estimator's.
        bootstrap: Whether the estimator gets the critic's value of the state after a truncation, if the
            environment would continue; without it a truncation looks like an end.

    Returns:
        The problem, with one prompt (P = 1) and M trajectories.
    """
    paths = all_trajectories(mdp, steps)
    chances = torch.where(
        paths.mask.bool(), mdp.transitions[paths.states, paths.actions, paths.successors], 1.0
    )
    mean_rewards = expected_rewards(mdp, steps + beyond)  # [S + 1, K]
    # Before step t, `steps_left[t]` steps remain; V^pi is the sum of that many discounted mean rewards.
    steps_left = steps + beyond - torch.arange(steps + 1)
    if critic == "true":
        discounted = mean_rewards * gamma ** torch.arange(steps + beyond, dtype=torch.double)
        values = torch.stack(
            [discounted[:, :k].sum(-1) for k in steps_left.tolist()], -1
        )  # [S + 1, T + 1]
    else:
        values = torch.nn.functional.pad(mdp.guesses, (0, 1))[:, None].expand(-1, steps + 1)
    truncated: Bool[Tensor, " M"] = paths.last < len(mdp.start)
    continues = beyond > 0
    rows = Completions(paths.actions, paths.mask, paths.states, [])
    logits = mdp.logits[None]
    logprobs = token_logprobs(logits, rows)
    environment = mdp.start[paths.states[:, 0]] * chances.prod(-1)
    return Problem(
        name=name
        or f"control, {steps} steps of {steps + beyond}, groups of {group_size}, critic: {critic}",
        group_size=group_size,
        mask=paths.mask,
        truncated=truncated,
        logprobs=logprobs,
        ref_logprobs=token_logprobs(mdp.reference[None], rows),
        entropy=token_entropies(logits, rows),
        rewards=(mdp.rewards[paths.states, paths.actions, paths.successors] * paths.mask)[None],
        scores=slopes_of(token_logprobs, logits, rows, shared=True),
        entropy_slopes=slopes_of(token_entropies, logits, rows, shared=True),
        values=(values[paths.states, torch.arange(steps)] * paths.mask)[None],
        greedy=_greedy(mdp, paths, environment * logprobs[0].sum(-1).exp()),
        max_length=steps + 2,
        environment=environment[None],
        bootstrap=values[paths.last, steps][None] if continues and bootstrap else None,
        after=mean_rewards[paths.last, :beyond][None] if continues else None,
    )


def _greedy(mdp: TabularMdp, paths: Trajectories, chances: Tensor) -> Int[Tensor, " 1"]:
    """Return the most probable of the trajectories in which every action is the most probable one."""
    best = mdp.logits.argmax(-1)[paths.states] == paths.actions
    return torch.where((best | (paths.mask == 0)).all(-1), chances, 0.0).argmax()[None]
