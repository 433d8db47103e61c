"""Baselines that remember earlier steps: a running mean of all returns, and one value for each prompt.

A memory is read before the rewards of a step are used and updated after it. In that order no return enters
its own baseline, so given the past the baseline is a constant, and the expected gradient stays exact.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.errors import Refused, Stopped
from tokenrl.user_code import guarded

ROUNDING = 1e-6
"""How far a sum of rewards may be outside its range, because weights such as .1 have no exact binary form."""


class Memory(Protocol):
    """The methods of a baseline with a memory; a class of your own that has them is made once per run."""

    def read(self, keys: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return the baseline of each row.

        Args:
            keys: A number for each row, which its prompt and the other columns of its data determine, in
                every step and every process. In control all are 0.
        """

    def update(self, *, keys: Int[Tensor, " N"], rewards: Float[Tensor, " N"]) -> None:
        """Learn from the rewards of a step; rows without a reward are left out."""

    def state_dict(self) -> Any:
        """Return the state that a checkpoint saves: numbers and tensors, in dictionaries and lists."""

    def load_state_dict(self, state: Any) -> None:
        """Continue from what `state_dict` returned."""


def own_memory(baseline: Callable[[], Any]) -> Memory:
    """Make the memory of a run from a user's class, and try its `read`.

    Raises:
        Refused: The class lacks a method, or `read` returns no finite numbers.
        Stopped: It cannot be made without arguments, or `read` raised an error.
    """
    name = getattr(baseline, "__name__", "")
    with failures_of_baseline(name):
        memory: Memory = baseline()
    missing = [x for x in ("state_dict", "load_state_dict") if not hasattr(memory, x)]
    if missing:
        raise Refused(
            f"The baseline {name!r} has no {' and no '.join(missing)}, which checkpoints need."
        )
    read(memory, torch.zeros(2, dtype=torch.int64))
    return memory


def failures_of_baseline(name: str) -> AbstractContextManager[None]:
    """Return a context that runs a user's baseline and reports an error of it in one sentence."""
    return guarded(f"The baseline {name!r} failed")


def read(memory: Memory, keys: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return what a memory holds for each row, before the rewards of a step are used.

    Raises:
        Refused: A memory of the user's own returned anything but finite numbers [N].
        Stopped: It raised an error.
    """
    name = type(memory).__name__
    with failures_of_baseline(name):
        # Copies in both directions: either may be changed in place.
        values = memory.read(keys.cpu().clone())
    if not isinstance(values, Tensor) or values.shape != keys.shape or not values.isfinite().all():
        raise Refused(
            f"The baseline {name!r} must return a tensor of {len(keys)} finite numbers from read."
        )
    return values.detach().double().clone()


def update(
    memory: Memory,
    keys: Tensor,
    rewards: Float[Tensor, " N *T"],
    valid: Bool[Tensor, " N"] | None = None,
) -> float:
    """Update a memory with the rewards of a step; return the mean baseline of its rows, as it was before.

    Raises:
        Stopped: The memory raised an error, or cannot use these rewards.
    """
    values = read(memory, keys)
    totals, rows = summed(rewards, valid)
    with failures_of_baseline(type(memory).__name__):
        memory.update(keys=keys.cpu()[rows], rewards=totals)
    return float(values[0] + (values - values[0]).mean())  # of equal values exactly that value


class RunningMean:
    """The mean of past returns: read `value` before a step is used, and call `update` once after it.

    Attributes:
        value: The baseline to use now; `initial` until the first update.
    """

    def __init__(self, decay: float | None = None, initial: float = 0.0) -> None:
        """Start at `initial`.

        Args:
            decay: The decay d, from 0 to below 1, of `value <- d value + (1 - d) mean of the step`. The
                influence of `initial` shrinks by d per step; no correction is made for it. None takes the
                plain mean of all returns seen so far.
            initial: The value before any update.
        """
        self.decay = decay
        self.value = float(initial)
        self.count = 0.0

    def read(self, keys: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return the value for each row."""
        return torch.full(keys.shape, self.value, dtype=torch.double)

    def update(
        self,
        rewards: Float[Tensor, " N *T"],
        valid: Bool[Tensor, " N"] | None = None,
        keys: Int[Tensor, " N"] | None = None,
    ) -> None:
        """Include the rewards of one step.

        Args:
            rewards: One number per row [N], or one per position [N, T], which is summed over time.
            valid: False where a row abstains and is left out [N]; None if all rows are valid.
            keys: Ignored.
        """
        totals, _ = summed(rewards, valid)
        rows = totals.numel()
        if rows == 0:
            return
        step = float(totals.mean())
        self.count += rows
        share = rows / self.count if self.decay is None else 1.0 - self.decay
        self.value += share * (step - self.value)  # rows / count gives the plain mean

    def state_dict(self) -> dict[str, float]:
        """Return the state that a checkpoint saves, as plain floats."""
        return {"value": self.value, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from what `state_dict` returned."""
        self.value = float(state["value"])
        self.count = float(state["count"])


class Tracker:
    """The value of each prompt, for rewards from 0 to 1 (SPO, Xu and Ding 2025, arXiv 2509.13232).

    A prompt has two counts, and its value is `a / (a + b)`. After a step in which it was drawn, both are
    multiplied by the decay, and each of its rewards r adds r to a and 1 - r to b. A prompt that was never
    drawn has the value of the running mean, and begins with the weight of one completion.

    The paper makes the decay of a prompt from how far the policy has moved on its latest completion, which
    would cost another scoring pass; here it is one constant.
    """

    def __init__(self, mean: RunningMean, decay: float) -> None:
        """Start without prompts."""
        self.mean = mean
        self.decay = decay
        self.counts: dict[int, tuple[float, float]] = {}

    def read(self, keys: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """Return the value of the prompt of each row."""
        counts = map(self._counts_of, keys.tolist())
        return torch.tensor([a / (a + b) for a, b in counts], dtype=torch.double)

    def _counts_of(self, key: int) -> tuple[float, float]:
        return self.counts.get(key, (self.mean.value, 1 - self.mean.value))

    def update(self, keys: Int[Tensor, " N"], rewards: Float[Tensor, " N"]) -> None:
        """Include the rewards of one step.

        Raises:
            Stopped: A reward is below 0 or above 1.
        """
        outside = rewards[(rewards < -ROUNDING) | (rewards > 1 + ROUNDING)]
        if len(outside):
            raise Stopped(
                f"The baseline 'tracker' takes rewards from 0 to 1, but one is {outside[0]:g}. Scale the "
                "rewards (reward_weights; in control reward_scale), or take the baseline 'running_mean'."
            )
        for key in dict.fromkeys(keys.tolist()):
            a, b = self._counts_of(key)
            self.counts[key] = self.decay * a, self.decay * b
        for key, reward in zip(keys.tolist(), rewards.tolist(), strict=True):
            a, b = self.counts[key]
            self.counts[key] = a + reward, b + 1 - reward
        self.mean.update(rewards)

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean, and the keys [P] and the counts [P, 2] of the prompts."""
        counts = torch.tensor(list(self.counts.values()), dtype=torch.double)
        return {
            "mean": self.mean.state_dict(),
            "keys": torch.tensor(list(self.counts)),
            "counts": counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.mean.load_state_dict(state["mean"])
        counts = map(tuple, state["counts"].tolist())
        self.counts = dict(zip(state["keys"].tolist(), counts, strict=True))


def summed(
    rewards: Float[Tensor, " N *T"], valid: Bool[Tensor, " N"] | None
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " N"]]:
    """Return the returns of the n valid rows, as float64 on the CPU, and which of the N rows these are."""
    totals = rewards.detach().cpu().double()  # in float32 a mean over many steps would drift
    totals = totals.sum(-1) if totals.ndim == 2 else totals
    rows = torch.ones(len(totals), dtype=torch.bool) if valid is None else valid.cpu()
    return totals[rows], rows
