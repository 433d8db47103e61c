"""Defines intervals, means with their errors, signal and noise of a gradient, and random generators.

The noise is found from two halves of an update, which hold different prompt groups and so give two
independent estimates g1 and g2 of the gradient, from n1 and n2 groups. `E<g1, g2> = |E g|^2` is the signal.
If the gradient of one group has the variance v, the difference of the halves has `v/n1 + v/n2` and the whole
gradient `v/(n1 + n2)`; so `|g1 - g2|^2 n1 n2 / (n1 + n2)^2` is an unbiased estimate of the variance of the
whole. The backward passes are those of the update in another order; the extra cost is one copy of the
gradient and three products.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; nan for what the sample does not determine.

    Attributes:
        value: The estimate; an unbiased one may be negative, and none is clamped.
        low: Lower end of the interval; minus infinity if it is unbounded.
        high: Upper end of the interval; infinity if it is unbounded.
    """

    value: float
    low: float
    high: float


def mean_and_error(
    values: Float[Tensor, " N"], group_size: int = 1
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the mean over completions and its standard error, `sd(means of groups) / sqrt(B)`.

    Completions of the same prompt are not independent draws, because they share the effect of the prompt.
    Groups are independent, so the expected square of this error is the variance of the mean. For a single
    group the error is that over its completions, which does not include the variation between prompts; for a
    single number it is nan.

    Args:
        values: One number for each completion, those of a prompt side by side.
        group_size: Number of consecutive completions of each prompt.
    """
    # All groups have the same size, so the mean of their means is the mean over all completions.
    groups = values.reshape(-1, group_size).mean(-1)  # [B]
    units = groups if len(groups) > 1 else values
    if len(units) < 2:
        return values.mean(), values.new_full((), math.nan)
    return values.mean(), units.std(correction=1) / len(units) ** 0.5


def signal_and_noise(half: Tensor, whole: Tensor, groups: tuple[int, int]) -> tuple[float, float]:
    """Estimate `|E g|^2` and `tr Var(g)` of an update's gradient g without bias; nan without two halves.

    Args:
        half: The part [D] of g that comes from the first half of the groups.
        whole: The gradient [D].
        groups: Numbers of groups in the first and in the second half.
    """
    if not min(groups):
        return math.nan, math.nan
    # A half has its share of the weight, so divided by that it has the expectation of the whole.
    shares = [n / sum(groups) for n in groups]
    first, second = half / shares[0], (whole - half) / shares[1]
    return float(first @ second), float((first - second).square().sum()) * shares[0] * shares[1]


class GradientDiagnostics:
    """Measures signal and noise of the gradient every few steps.

    Attributes:
        every: Number of steps from one measurement to the next; 0 measures nothing.
    """

    def __init__(self, every: int) -> None:
        """Measure in every `every`-th step; 0 for never."""
        self.every = every
        self._previous: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether to measure in this step (counted from 1)."""
        return self.every > 0 and step % self.every == 0

    def metrics(self, half: Tensor, whole: Tensor, groups: tuple[int, int]) -> dict[str, float]:
        """Compare the gradient of the first half of the groups with that of the whole update.

        Args:
            half: The part [D] of the update's gradient that comes from the first half of the groups.
            whole: The gradient [D] of the update.
            groups: Numbers of groups in the first and in the second half; in control, of episodes.

        Returns:
            `gradient/snr`: `|E g|^2 / tr Var(g)` of an update of this size; the estimate of the signal is
            unbiased and so may be negative. `gradient/noise_scale`: the number of prompts per update at which
            signal and noise are equal (McCandlish et al. 2018, arXiv 1812.06162); nan if the estimated signal
            is not positive. `gradient/cosine_previous`: cosine with the previous gradient measured. The first
            two are nan where a half is empty, as in an update of a single group.
        """
        signal, noise = signal_and_noise(half, whole, groups)
        out = {
            "gradient/snr": signal / noise if noise else math.nan,
            "gradient/noise_scale": sum(groups) * noise / signal if signal > 0 else math.nan,
        }
        if self._previous is not None:
            previous = self._previous.to(whole.device)  # a saved one comes back on the CPU
            norm = float(whole.norm() * previous.norm())
            out["gradient/cosine_previous"] = float(whole @ previous) / norm if norm else math.nan
        self._previous = whole
        return out

    def state_dict(self) -> dict[str, Tensor | None]:
        """Return the previous gradient [D], with which the next one is compared; None before the first."""
        return {"previous": self._previous}

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        """Continue from what `state_dict` returned."""
        self._previous = state["previous"]


def flat_gradient(parameters: list[nn.Parameter], accelerator: Any = None) -> Tensor:
    """Return a copy of all gradients as one float32 vector [D], summed over an accelerator's processes."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.detach().reshape(-1).float() for part in parts])
    return flat if accelerator is None else accelerator.reduce(flat, reduction="sum")


def generator_of(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """Return a random generator on the CPU for one purpose of a run, and for one step or draw of it.

    The three are hashed to 32 bits, because torch's CPU generator ignores all higher bits of a seed.
    """
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
