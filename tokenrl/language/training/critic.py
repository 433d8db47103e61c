"""A learned value of every prefix, for the estimators that have a critic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.core.estimator import Estimator


class Critic:
    """A linear head on the policy's last hidden state, with an optimiser of its own.

    It reads the features and does not change them, so the policy's gradient is what the estimator says. A
    value depends on the prompt and the tokens before the action, never on the action, so any value is a valid
    baseline.

    Attributes:
        head: layer norm and linear map, in float32; it starts at the value 0.
    """

    def __init__(
        self, hidden_size: int, device: torch.device, *, learning_rate: float, iterations: int
    ) -> None:
        """Start at the value 0 everywhere; `iterations` passes over the step are made in each update."""
        linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.LayerNorm(hidden_size), linear).to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=learning_rate, weight_decay=0.0)
        self.iterations = iterations

    def values(self, hidden: Tensor | None) -> Tensor:
        """Values [n, T] of the states whose features are `hidden` [n, T, H]."""
        assert hidden is not None, "sample with keep_hidden=True"
        return self.head(hidden.float()).squeeze(-1)

    def update(
        self, estimator: Estimator, hidden: Tensor, returns: Tensor, weights: Tensor, accelerator: Any
    ) -> float:
        """Move the values towards the returns; the rows are this process's, the weights the whole step's.

        Args:
            estimator: gives the loss.
            hidden: features of this process's rows [n, T, H].
            returns: what followed each state [n, T].
            weights: weight of each state in the whole step [n, T].
            accelerator: sums gradients over processes.

        Returns:
            The loss before the update, over all processes.
        """
        old = self.values(hidden).detach()
        first = 0.0
        for iteration in range(self.iterations):
            self.optimizer.zero_grad()
            loss = estimator.critic_loss(
                self.values(hidden), returns.float(), weights.float(), old_values=old
            )
            loss.backward()
            for parameter in self.head.parameters():
                parameter.grad = accelerator.reduce(parameter.grad, reduction="sum")
            if iteration == 0:
                first = float(accelerator.reduce(loss.detach(), reduction="sum"))
            self.optimizer.step()
        return first
