"""Orders the rows of the data: prompts for each rollout, demonstrations or pairs for each update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tokenrl.errors import Refused, Stopped
from tokenrl.language.tasks.rows import Row, Rows
from tokenrl.names import NamedFunction
from tokenrl.runs.output import quantity
from tokenrl.settings import check_choice
from tokenrl.user_code import guarded

Array = NDArray[np.float64]
Shuffle = Callable[[int, int], Iterator[list[int]]]  # of a number of rows and a seed

MIN_PROMPTS = 13
"""With fewer distinct training prompts (16, of which a fifth is held out) a policy learns them by heart."""
DECAY = 0.875
"""Factor of what was seen of a prompt before, each time that it is drawn (as in the baseline 'tracker')."""
TINY = 1e-300
"""In place of a divisor of 0."""
PRIOR = 2.0
"""Completions of the typical variance that each prompt is given."""


def few_prompts(rows: Rows) -> list[str]:
    """Return a warning if fewer than 13 distinct prompts, but several, are left to train on; else nothing.

    Args:
        rows: training rows with a `prompt` each.
    """
    distinct = len(np.unique(rows.hashes))
    if distinct == 1 or distinct >= MIN_PROMPTS:
        return []
    return [
        f"only {quantity(distinct, 'distinct prompt')} in {len(rows):,} training rows: the policy can learn "
        "the answers by heart, which says nothing about other prompts. Give more data."
    ]


class RowOrder:
    """Draws row numbers without end: each epoch has a new random order and holds every row once.

    The orders follow from the seed, so the number of rows drawn so far is the whole state.
    """

    def __init__(self, num_rows: int, seed: int, shuffle: Shuffle) -> None:
        """Start before the first epoch.

        Args:
            num_rows: number of rows of an epoch.
            seed: seed of the orders.
            shuffle: makes the orders of all epochs, one after the other.

        """
        self._num_rows = num_rows
        self._seed = seed
        self._shuffle = shuffle
        self._start(0)

    def _start(self, position: int) -> None:
        orders = self._shuffle(self._num_rows, self._seed)
        self._following = islice(chain.from_iterable(orders), position, None)
        self._peeked: list[int] = []
        self.position = position

    def _peek(self, count: int) -> list[int]:
        """Return the numbers of the next `count` rows, and draw none."""
        self._peeked += islice(self._following, max(0, count - len(self._peeked)))
        return self._peeked[:count]

    def draw(self, count: int) -> list[int]:
        """Return the numbers of the next `count` rows."""
        numbers = self._peek(count)
        del self._peeked[:count]
        self.position += count
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue exactly, as plain integers."""
        return {"position": self.position, "seed": self._seed, "num_rows": self._num_rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of a saved state.

        Raises:
            Refused: the state belongs to another seed or another number of rows, and so to another order.
        """
        for name, value in RowOrder.state_dict(self).items():
            if name != "position" and state[name] != value:
                raise Refused(
                    f"The saved order of the rows has {name} {state[name]} and this run has {value}: resume "
                    "with the same data and seed, or start a new run."
                )
        self._start(state["position"])


class PromptStream(RowOrder):
    """Draws the prompts of training; a step may have the end of one epoch and the start of the next."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        """Start before the first epoch."""
        super().__init__(len(rows), seed, prompt_orders)
        self._rows = rows

    @property
    def epoch(self) -> float:
        """Passes over the data so far (2.5 means half-way through the third)."""
        return self.position / len(self._rows)

    def peek(self, count: int) -> list[tuple[int, Row]]:
        """Return the next `count` prompts, each with the number of prompts before it, and draw none."""
        rows = map(self._rows.__getitem__, self._peek(count))
        return list(enumerate(rows, self.position))

    def draw_prompts(self, count: int) -> list[tuple[int, Row]]:
        """Draw the next `count` prompts; return each with the number of prompts drawn before it."""
        prompts = self.peek(count)
        self.draw(count)
        return prompts

    def factors(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the factors by which prompts count alike, by their numbers in the latest draw [N]: all are 1."""
        return torch.ones(len(numbers))

    def learn(self, numbers: torch.Tensor, rewards: torch.Tensor) -> dict[str, float]:
        """Take the rewards of a step, on which this order does not depend; return no metrics."""
        return {}


class WeightedPrompts(PromptStream):
    """Draws prompts with chances that may depend on the rewards that were seen of each.

    A pass draws as many prompts as there are rows. Its draws lie at equal distances, in random order (systematic
    sampling). So each prompt comes as often as its chance says, up to one: with equal chances once in each pass.

    A part of the chances, the floor, is shared equally. The rest is in proportion to weights: numbers of a column
    of the data, or what a function makes of the rewards so far. Chances are set when a pass begins and then stand
    still: given all before the pass, the factors 1 / (n chance) of a prompt have the mean sum 1 in it. If rewards
    changed the chances between draws at equal distances, a prompt's factors would depend on its rewards.
    """

    def __init__(
        self, rows: Rows, seed: int, weights: str | Callable[..., Any], floor: float
    ) -> None:
        """Start before the first step, without any rewards.

        Args:
            rows: the n training rows.
            seed: seed of the draws.
            weights: `variance`; a column of the data; or a function, itself or by its name. It gets the number of
                completions, their mean reward and the variance of their rewards, as arrays [n] in the order of the
                rows, and returns weights [n].
            floor: the share of all chances that is divided equally.

        Raises:
            Refused: there is no such column or function, or it does not have weights.
        """
        self._floor = floor
        self._function: Any = by_variance
        if callable(weights):
            self._function = weights
        elif ":" in weights:
            self._function = NamedFunction(weights)
        elif weights != "variance":
            check_choice("prompt_weights", weights, ["uniform", "variance", *rows.columns])
            column = rows.column(weights)
            self._function = lambda *_: column
        # Of each row the completions, their mean reward, and the sum of squared distances from it.
        self._moments = np.zeros((3, len(rows)))
        super().__init__(rows, seed)
        self._peek(1)  # so that weights which cannot be used are refused now

    def _start(self, position: int) -> None:
        number, place = divmod(position, self._num_rows)
        orders = chain.from_iterable(map(self._order, count(number)))
        self._following = islice(orders, place, None)
        self._peeked = []
        self.position = position
        self._passes: dict[int, Array] = {}  # chances [n], by the number of the pass
        self._dealt: dict[int, int] = {}  # rows of the latest draw, by their numbers in the stream

    def _order(self, number: int) -> list[int]:
        """Return the rows of a pass in their order; one that begins takes the chances that rewards make now."""
        size = self._num_rows
        chances = self._passes.setdefault(number, self._present_chances())
        generator = np.random.default_rng([self._seed, number])
        draws = (generator.permutation(size) + generator.random()) / size
        rows = np.searchsorted(chances.cumsum(), draws, side="right")
        return np.minimum(rows, size - 1).tolist()

    def _present_chances(self) -> Array:
        """Return the chances that the rewards so far make [n]."""
        completions, means, distances = self._moments
        variances = distances / np.maximum(completions, TINY)
        kind = Stopped if completions.any() else Refused
        with guarded("prompt_weights failed", kind):
            weights = self._function(*self._moments[:2].copy(), variances)
            weights = np.asarray(weights, float)
        if weights.shape != means.shape or not np.isfinite(weights).all() or weights.min() < 0:
            raise kind(
                f"prompt_weights must give {len(means):,} finite numbers of at least 0, one for each training row."
            )
        weights = weights + TINY  # all are equal where all are 0
        share = weights / weights.sum()
        return self._floor / len(share) + (1 - self._floor) * share

    def draw(self, count: int) -> list[int]:
        """Return the numbers of the next `count` rows, and remember what this draw is made of."""
        first = self.position
        rows = super().draw(count)
        self._dealt = dict(enumerate(rows, first))
        self._passes = {n: x for n, x in self._passes.items() if n >= first // self._num_rows}
        return rows

    def factors(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return 1 / (n chance) of prompts by their numbers in the latest draw [N], in double precision."""
        size = self._num_rows
        chances = [self._passes[n // size][self._dealt[n]] for n in numbers.tolist()]
        return torch.from_numpy(1 / (size * np.array(chances)))

    def learn(self, numbers: torch.Tensor, rewards: torch.Tensor) -> dict[str, float]:
        """Remember the rewards [N] of completions whose prompts have these numbers [N]; return metrics of the step.

        What was seen of a prompt before counts less each time that the prompt comes back.
        """
        rows = [self._dealt[number] for number in numbers.tolist()]
        completions, means, distances = self._moments
        for sums in (completions, distances):
            sums[rows] *= DECAY  # once, also where a row is there several times
        # By Welford, since a difference of large squares would be all rounding.
        for row, reward in zip(rows, rewards.tolist(), strict=True):
            completions[row] += 1
            distance = reward - means[row]
            means[row] += distance / completions[row]
            distances[row] += distance * (reward - means[row])
        return {"prompts/effective": float(1 / (self._passes[max(self._passes)] ** 2).sum())}

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to continue exactly."""
        under_way = self._passes.get(self.position // self._num_rows, np.empty(0))
        moments, chances = (torch.from_numpy(x.copy()) for x in (self._moments, under_way))
        return {**super().state_dict(), "moments": moments, "chances": chances}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of a saved state, with its rewards and with the chances of its pass."""
        self._moments = state["moments"].numpy().copy()
        super().load_state_dict(state)
        if len(state.get("chances", ())):  # a pass is under way; an earlier version saved none
            self._passes = {self.position // self._num_rows: state["chances"].numpy()}


def prompt_stream(
    rows: Rows, seed: int, weights: str | Callable[..., Any], floor: float
) -> PromptStream:
    """Return what draws the training prompts: equally often, or by weights (see `WeightedPrompts`)."""
    is_uniform = weights == "uniform"
    return PromptStream(rows, seed) if is_uniform else WeightedPrompts(rows, seed, weights, floor)


def by_variance(completions: Array, _means: Array, variances: Array) -> Array:
    """Return the variance of the rewards of each prompt [n], where few are known nearer to that of all prompts."""
    typical = np.average(variances, weights=completions) if completions.any() else 1.0
    return (completions * variances + PRIOR * typical) / (completions + PRIOR)


def prompt_orders(num_rows: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of prompts in each epoch."""
    for epoch in count():
        generator = np.random.default_rng([seed, epoch])
        yield generator.permutation(num_rows).tolist()


def batch_orders(num_rows: int, seed: int) -> Iterator[list[int]]:
    """Yield the order of demonstrations or pairs in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(num_rows, generator=generator).tolist()
