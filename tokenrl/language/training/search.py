"""Keeps the best completions of a run, and ends it with the first that has the reward that is searched for.

Where a policy searches, as for a formula or a molecule, what counts is the best text that it ever wrote. Every process
holds the same record. Replayed and logged completions and those without a reward count nowhere, and neither do greedy
ones, those of evaluations, and those whose group was replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from tokenrl.files import State, canonical
from tokenrl.language.rollout.rewarded import Rewarded, Row, in_rows, prompts_of, texts_of
from tokenrl.runs.processes import gather_objects

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy

_MOST = 10
"""Completions that are kept."""


@dataclass
class Search:
    """What the steps of a run have found so far.

    Attributes:
        goal: the least reward of a completion with which the run ends; None where none ends it.
        until_solved: the completions that were sampled until the first with that reward, itself included; None before.
        best: up to ten distinct completions, the best first: `reward`, `step`, `prompt` and `completion` of each. A
            text that a prompt got several times has the largest of its rewards, and the first step with it.
    """

    goal: float | None = None
    until_solved: int | None = None
    best: list[Row] = field(default_factory=list)

    def add(self, policy: Policy, rows: Rewarded, step: int, before: int) -> None:
        """Add the completions of a step.

        Args:
            policy: decodes them.
            rows: this process's rows.
            step: number of the step.
            before: the completions that were sampled in earlier steps.
        """
        rewards = rows.rewards.masked_fill(~(rows.sampled & rows.valid), -torch.inf)
        if self.goal is not None and self.until_solved is None:
            reached = gather_objects((rewards >= self.goal)[rows.sampled].tolist())
            if any(reached):
                self.until_solved = before + reached.index(True) + 1
        least = self.best[-1]["reward"] if len(self.best) == _MOST else -torch.inf
        index = (rewards > least).nonzero().flatten()
        new: Sequence[Row] = ()
        if len(index):
            rows = rows.take(index)
            texts = {
                "prompt": prompts_of(policy, rows, rows.data),
                "completion": texts_of(policy, rows),
            }
            new = in_rows({"reward": rows.rewards.tolist(), "step": [step] * len(rows), **texts})
        self.best = best_rows([*self.best, *gather_objects(best_rows(new))])

    def state_dict(self) -> State:
        """Return what a continuation needs."""
        return dict(vars(self))

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned."""
        vars(self).update(state)


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the largest rewards, the best first: the first of each text of a prompt, at most ten."""
    distinct = dict[str, Row]()
    for row in sorted(rows, key=lambda row: -row["reward"]):
        distinct.setdefault(canonical([row["prompt"], row["completion"]]), row)
    return [*distinct.values()][:_MOST]
