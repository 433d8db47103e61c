"""Estimates and how far to trust them: a mean with its standard error, and the gradient with its noise.

How noisy the gradient is can be seen from the gradient itself, for two halves of a step are two independent
estimates of it. The halves hold different prompt groups, so what they agree on is signal: `E<g1, g2> =
|E g|^2`, and `|g1 - g2|^2 / 4` estimates the variance of the whole step's gradient without bias. The backward
passes are those of the update in another order; only a copy and three products are added.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def mean_and_error(
    values: Float[Tensor, " N"], group_size: int = 1
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean of one number a completion, and its standard error over groups, `sd(means of groups) / sqrt(B)`.

    Completions of one prompt share what the prompt adds, so they are not N independent draws; groups are
    independent, and the square of this error is the mean's variance in expectation. Of a single group the
    error is that over its completions, which says nothing of other prompts; of a single number it is nan.

    Args:
        values: One number a completion, prompt-major.
        group_size: Consecutive completions of each prompt.
    """
    # Groups have one size, so the mean of their means is the mean over all, and their spread is its error's.
    groups = values.reshape(-1, group_size).mean(-1)  # [B]
    units = groups if len(groups) > 1 else values
    if len(units) < 2:
        return values.mean(), values.new_full((), math.nan)
    return values.mean(), units.std(correction=1) / len(units) ** 0.5


class GradientDiagnostics:
    """Signal and noise of the gradient every few steps.

    Attributes:
        every: steps between two measurements; 0 measures nothing.
    """

    def __init__(self, every: int) -> None:
        """Measure every `every` steps."""
        self.every = every
        self._previous: Tensor | None = None

    def due(self, step: int) -> bool:
        """Whether to measure in this step (counted from 1)."""
        return self.every > 0 and step % self.every == 0

    def metrics(self, half: Tensor, whole: Tensor, prompts: int) -> dict[str, float]:
        """Compare the flat gradients of half of the groups and of all, both weighted as parts of the step.

        Args:
            half: gradient [D] of the first half of the groups.
            whole: gradient [D] of the step.
            prompts: prompts in the step; in control, where each is a group of its own, episodes.

        Returns:
            `gradient/snr`: `|E g|^2 / tr Var(g)` of a step of this size; either part is unbiased, so it may
            be negative. `gradient/noise_scale`: prompts a step at which signal and noise would be equal
            (McCandlish et al. 2018, arXiv 1812.06162); NaN where no signal was seen.
            `gradient/cosine_previous`: cosine to the last gradient measured.
        """
        # A half carries half of the step's weight, so twice it estimates the same as the whole.
        first, second = 2 * half, 2 * (whole - half)
        signal = float(first @ second)
        # whole = (first + second)/2, so Var(whole) = (Var(first) + Var(second))/4 = E|first - second|^2/4
        noise = float((first - second).square().sum()) / 4
        out = {
            "gradient/snr": signal / noise if noise else math.nan,
            "gradient/noise_scale": prompts * noise / signal if signal > 0 else math.nan,
        }
        if self._previous is not None:
            norm = float(whole.norm() * self._previous.norm())
            out["gradient/cosine_previous"] = float(whole @ self._previous) / norm if norm else math.nan
        self._previous = whole
        return out


def flat_gradient(parameters: list[nn.Parameter], accelerator: Any = None) -> Tensor:
    """Copy all gradients [D] in float32; with an accelerator, the mean over processes not yet averaged."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.detach().reshape(-1).float() for part in parts])
    return flat if accelerator is None else accelerator.reduce(flat, reduction="mean")
