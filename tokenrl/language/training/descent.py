"""Minimises a loss over rows of data (demonstrations, preferences) with AdamW, one batch after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Stopped
from tokenrl.language.tasks.stream import Batches
from tokenrl.runs.optimizers import load_optimizer_state, load_schedule, make_schedule, optimizer_state


class Descent:
    """The optimiser of a supervised training, and how far it has come.

    The learning rate falls linearly to 0. Rows are drawn without replacement, one epoch after the other.

    Attributes:
        parameters: the weights that are trained.
        step: number of updates so far.
        loss_before: loss of the first batch before its update; None before the first.
        loss_after: the same of the latest batch.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        rows: int,
        *,
        of: str,
        max_steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = math.inf,
    ) -> None:
        """Start before the first update.

        Args:
            parameters: the weights to train.
            rows: number of rows in the data.
            of: what is trained, in words, for errors.
            max_steps: number of updates over which the learning rate falls to 0.
            batch_size: rows per update.
            learning_rate: peak learning rate.
            seed: seed of the order of the rows.
            weight_decay: AdamW's weight decay.
            max_grad_norm: gradients are clipped to this norm.
        """
        self.parameters, self._of, self._max_grad_norm = list(parameters), of, max_grad_norm
        self._batches = Batches(rows, batch_size, seed)
        fused = self.parameters[0].device.type in ("cpu", "cuda")
        options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, "fused": fused}
        self._optimizer = torch.optim.AdamW(self.parameters, **options)
        self._schedule = make_schedule("linear", self._optimizer, max_steps)
        self.step = 0
        self.loss_before: float | None = None
        self.loss_after: float | None = None

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self._schedule.get_last_lr()[0])

    def batch(self) -> list[int]:
        """Return the numbers of the next batch's rows."""
        return self._batches.next()

    def update(self, loss: Tensor) -> float:
        """Update the weights by the gradient of a loss; return the gradient's norm before clipping.

        Raises:
            Stopped: the loss or the norm of its gradient is NaN or infinite; the weights are as before.
        """
        self.step += 1
        value = loss.item()
        if not math.isfinite(value):
            raise self._not_finite(f"The loss of {self._of} is {value}")
        self._optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(self.parameters, self._max_grad_norm))
        if not math.isfinite(norm):  # clipped, it would be NaN in every weight
            self._optimizer.zero_grad()
            raise self._not_finite(f"The norm of the gradient of {self._of} is {norm}")
        self._optimizer.step()
        self._schedule.step()
        self.loss_before = value if self.loss_before is None else self.loss_before
        self.loss_after = value
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation needs besides the weights; tensors are references, not copies."""
        return {
            "step": self.step,
            "loss_before": self.loss_before,
            "loss_after": self.loss_after,
            "batches": self._batches.state_dict(),
            "optimizer": optimizer_state(self._optimizer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the weights are loaded apart from this.

        Raises:
            Refused: the number of rows, the seed or the shapes of the weights differ from what was saved.
        """
        self.step, self.loss_before, self.loss_after = (
            state[name] for name in ("step", "loss_before", "loss_after")
        )
        self._batches.load_state_dict(state["batches"])
        load_optimizer_state(self._optimizer, state["optimizer"])
        load_schedule(self._schedule, self.step)

    def _not_finite(self, what: str) -> Stopped:
        return Stopped(
            f"{what} at step {self.step}, and the weights stay as they were before it: lower the learning "
            "rate; in low precision try float32."
        )
