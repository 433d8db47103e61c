"""Keeps the best completions of a run.

Where a policy searches, as for a formula or a molecule, what counts is the best text that it ever wrote. Every process
holds the same record. Replayed completions and those without a reward count nowhere, and neither do greedy ones, those
of evaluations, and those whose group was replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    """The best completions of the steps of a run so far.

    Attributes:
        best: up to ten distinct completions, the best first: `reward`, `step`, `prompt` and `completion` of each. A
            text that a prompt got several times has the largest of its rewards, and the first step with it.
    """

    best: list[Row] = field(default_factory=list)

    def add(self, policy: Policy, rows: Rewarded, step: int) -> None:
        """Add the completions of a step.

        Args:
            policy: decodes them.
            rows: this process's rows.
            step: number of the step.
        """
        rewards = rows.rewards.masked_fill(rows.replayed | ~rows.valid, -torch.inf)
        least = self.best[-1]["reward"] if len(self.best) == _MOST else -torch.inf
        index = (rewards > least).nonzero().flatten()
        new = best_rows(_in_words(policy, rows.take(index), step)) if len(index) else []
        self.best = best_rows([*self.best, *gather_objects(new)])

    def state_dict(self) -> State:
        """Return what a continuation needs."""
        return {"best": self.best}

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned."""
        self.best = state["best"]


def _in_words(policy: Policy, rows: Rewarded, step: int) -> list[dict[str, Any]]:
    """Return completions with what is kept of them."""
    columns = {
        "reward": rows.rewards.tolist(),
        "step": [step] * len(rows),
        "prompt": prompts_of(policy, rows, rows.data),
        "completion": texts_of(policy, rows),
    }
    return in_rows(columns)


def best_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the largest rewards, the best first: the first of each text of a prompt, at most ten."""
    distinct = dict[str, Row]()
    for row in sorted(rows, key=lambda row: -row["reward"]):
        distinct.setdefault(canonical([row["prompt"], row["completion"]]), row)
    return [*distinct.values()][:_MOST]
