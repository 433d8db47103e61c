"""Keeps the best completions of each prompt, of which some join the rows of every step (experience replay).

A replayed completion counts in the baseline and in the loss like a new one, under the log-probabilities with
which it was sampled. The estimator's importance weights it by them. Metrics and memories of rewards are of the
new completions alone, but where rewards are compared. Rewards choose what is kept, and equal texts are kept once, so
the expected gradient is
biased with any weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.statistics import generator_of
from tokenrl.files import State
from tokenrl.language.rollout.rewarded import Rewarded
from tokenrl.language.rollout.rollout import COLUMNS, cat
from tokenrl.language.training.experience import Experience, data_keys

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.training.learner import Learner

KEPT = (*COLUMNS, "allowed_keys", "rewards", "by_function", "valid")
"""The columns of a row that are kept: those that the generator filled, and rewards."""


@dataclass
class Replay:
    """The best completions of each prompt so far.

    Attributes:
        count: completions that join the new ones of each prompt in a step, as far as there are so many.
        capacity: the most completions that are kept of a prompt.
        seed: seed of the draws.
        best: for each prompt, by the key of its data, its completions, the best first.
    """

    count: int
    capacity: int
    seed: int
    best: dict[int, Rewarded] = field(default_factory=dict)

    def join(self, learner: Learner, rows: Rewarded, step: int) -> Rewarded:
        """Return the rows with replayed ones behind the new ones of each prompt, in random order.

        Where too few are kept yet, a new row takes the place of a replayed one and abstains, so that groups have
        equal sizes.

        Args:
            learner: scores the replayed rows under the present policy.
            rows: the new rows of this process, G of each prompt.
            step: number of the step.
        """
        new = learner.args.num_generations
        pool = _kept(rows.columns() | {"valid": torch.zeros_like(rows.valid)})
        heads = range(0, len(rows), new)
        index = list[int]()
        for head, key in zip(heads, data_keys(rows.data[::new]).tolist(), strict=True):
            drawn = list[int]()
            if key in self.best:
                purpose = f"replay of prompt {int(rows.prompt_index[head])}"
                generator = generator_of(self.seed, purpose, step)
                order = torch.randperm(len(self.best[key]), generator=generator)
                drawn = (len(pool) + order[: self.count]).tolist()
                pool = cat([pool, self.best[key]])
            index += drawn + [head] * (self.count - len(drawn))
        prompts = torch.tensor(heads).repeat_interleave(self.count)
        old = learner.with_missing_fields(
            replace(
                pool.take(torch.tensor(index)),
                prompt_index=rows.prompt_index[prompts],
                data=[rows.data[i] for i in prompts],
                logs=[{}] * len(prompts),
            )
        )
        joined = cat([rows, old])
        groups = torch.arange(len(joined)).split([len(rows), len(prompts)])
        order = torch.cat([x.view(len(heads), -1) for x in groups], dim=1)
        return joined.take(order.flatten())

    def keep(self, policy: Policy, rows: Experience) -> None:
        """Keep the new rows of a step that are among the best of their prompt, each text once.

        Args:
            policy: decodes the completions.
            rows: all rows of the step, the same on every process.
        """
        for key in rows.keys.unique().tolist():
            index = (rows.rewarded & (rows.keys == key)).nonzero().flatten()
            if not len(index):
                continue
            table = _kept(rows.columns()).take(index)
            if key in self.best:
                table = cat([self.best[key], table])
            texts = policy.decode(table.completion_ids, table.mask)
            best = best_rows(table.rewards, texts)[: self.capacity]
            self.best[key] = table.take(torch.tensor(best))

    def state_dict(self) -> State:
        """Return the completions that are kept, as tensors."""
        return {"best": {key: table.tensors() for key, table in self.best.items()}}

    def load_state_dict(self, state: State) -> None:
        """Continue from what `state_dict` returned."""
        self.best = {key: _kept(columns) for key, columns in state["best"].items()}


def best_rows(rewards: Tensor, texts: Sequence[str]) -> list[int]:
    """Return the numbers of the rows with the largest rewards, the best first, one row for each text.

    A text has the largest of its rewards; of rows with equal rewards the latest counts. So a text that earns less
    when it is written again stays, and what is kept does not depend on the order of unequal rewards. The mean of
    a noisy reward would be lower: the largest of two fair draws of 0 and 1 is 3/4 on average.

    Args:
        rewards: one of each row [N].
        texts: N texts.
    """
    best = {texts[i]: i for i in rewards.argsort(stable=True).tolist()}
    return sorted(best.values(), key=lambda i: -rewards[i])


def _kept(columns: Mapping[str, Any]) -> Rewarded:
    """Return rows with the columns that are kept alone, as replayed ones."""
    kept = {name: columns[name] for name in KEPT if name in columns}
    return Rewarded(**kept, replayed=torch.ones_like(kept["valid"]))
