"""Defines intervals, means with their errors, and random generators."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


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


def explained(values: Float[Tensor, " N"], returns: Float[Tensor, " N"]) -> float:
    """Return the share of the variance of the returns that a critic's values explain, at most 1; nan without any.

    Below 0 the critic is worse than a constant.
    """
    spread = float(returns.var())
    return 1 - float((returns - values).var()) / spread if spread > 0 else math.nan


def generator_of(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    """Return a random generator on the CPU for one purpose of a run, and for one step or draw of it.

    The three are hashed to 32 bits, because torch's CPU generator ignores all higher bits of a seed.
    """
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
