"""The critic: learns the value of every prefix of a completion, for the estimators that need values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenrl.core.estimator import Estimator


class Critic:
    """A linear head on the policy's last hidden state, with an optimiser of its own.

    The critic's loss does not reach the policy's weights, so the policy's gradient is the estimator's alone.
    A value depends on the prompt and on the tokens before the action, never on the action itself; therefore
    it is a valid baseline, however wrong it is.

    Attributes:
        head: layer norm and linear map, in float32; at the start all values are 0.
        optimizer: AdamW over the head's parameters.
        iterations: passes over the step's rows in each update.
    """

    def __init__(
        self, hidden_size: int, device: torch.device, *, learning_rate: float, iterations: int
    ) -> None:
        """Make a critic whose values are all 0.

        Args:
            hidden_size: width H of the hidden states.
            device: device of the head.
            learning_rate: learning rate of AdamW.
            iterations: passes over the step's rows in each update.
        """
        linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), linear).to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=learning_rate, weight_decay=0.0)
        self.iterations = iterations

    def values(self, hidden: Tensor | None) -> Tensor:
        """Return the values [n, T] of the states whose features are `hidden` [n, T, H]."""
        assert hidden is not None, "sample with keep_hidden=True"
        return self.head(hidden.float()).squeeze(-1)

    def update(
        self, estimator: Estimator, hidden: Tensor, returns: Tensor, weights: Tensor, accelerator: Any
    ) -> float:
        """Fit the values to the returns.

        Args:
            estimator: defines the loss.
            hidden: features of this process's rows [n, T, H].
            returns: return from each state on [n, T], the target of its value.
            weights: weight of each state in the loss of the whole step [n, T]; over all processes they sum
                to 1.
            accelerator: sums gradients over processes.

        Returns:
            The loss before the update, summed over all processes.
        """
        old = self.values(hidden).detach()
        first = 0.0
        for iteration in range(self.iterations):
            self.optimizer.zero_grad()
            loss = estimator.critic_loss(
                self.values(hidden), returns.float(), weights.float(), old_values=old
            )
            loss.backward()
            for parameter in self.head.parameters():  # summed, not averaged: the weights are the whole step's
                parameter.grad = accelerator.reduce(parameter.grad, reduction="sum")
            if iteration == 0:
                first = float(accelerator.reduce(loss.detach(), reduction="sum"))
            self.optimizer.step()
        return first

    def state_dict(self) -> dict[str, Any]:
        """Return the weights of the head and the state of its optimiser."""
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
