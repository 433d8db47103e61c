"""Says what metrics are means of, and estimates means over prompts and the best of k samples without bias."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokenrl.runs.metric_table import is_rounding

if TYPE_CHECKING:
    from torch import Tensor

    from tokenrl.language.rollout.rewarded import Rewarded


class Estimate(NamedTuple):
    """A mean over prompts and its standard error, which is nan for a single prompt."""

    value: float
    stderr: float


def over_prompts(values: Sequence[float] | np.ndarray) -> Estimate:
    """Return the mean over prompts of one value per prompt, and its standard error `sd / sqrt(B)`.

    Both are nan without a value, and the error also with a single one.

    Args:
        values: one number for each of B prompts; nan values are left out.
    """
    numbers = np.array(values, dtype=np.float64)
    numbers = numbers[~np.isnan(numbers)]
    size = len(numbers)
    mean = float(numbers.mean()) if size else math.nan
    error = math.nan
    if size > 1:
        spread = float(numbers.std(ddof=1))
        # Equal numbers may differ from their mean by a rounding.
        error = 0.0 if is_rounding(spread, mean) else spread / math.sqrt(size)
    return Estimate(mean, error)


def estimates(
    by_prompt: Mapping[str, Sequence[float]], always: Sequence[str] = ()
) -> dict[str, float]:
    """Return for each metric its mean over prompts, and the standard error under its name and `_stderr`.

    Args:
        by_prompt: for each name one value per prompt, see `over_prompts`.
        always: names that stay where no prompt has a value; other numbers that are NaN are left out.
    """
    metrics = {}
    for name, values in by_prompt.items():
        metrics[name], metrics[f"{name}_stderr"] = over_prompts(values)
    return {name: x for name, x in metrics.items() if name in always or not math.isnan(x)}


def metric_values(rows: Rewarded, names: Sequence[str]) -> dict[str, Tensor]:
    """Return what is averaged over completions in a step as in an evaluation, by the names of the metrics.

    The numbers are in float64, N of each metric but for rewards of functions, which may abstain.

    Args:
        rows: N completions.
        names: names of the F reward functions.
    """
    values = {
        "completions/mean_length": rows.mask.sum(dim=1),
        "completions/clipped_ratio": rows.truncated,
    }
    for name, column in zip(names, rows.by_function.T, strict=True):
        abstained = column.isnan()
        values[f"rewards/{name}/abstained"] = abstained
        if not abstained.all():
            values[f"rewards/{name}/mean"] = column[~abstained]
    return {name: x.double() for name, x in values.items()}


def known_rewards(rewards: Tensor, valid: Tensor, size: int) -> list[np.ndarray]:
    """Return the rewards [N] of each prompt's `size` completions, without those that are not valid [N]."""
    groups = zip(rewards.split(size), valid.split(size), strict=True)
    return [of_prompt[is_valid].numpy() for of_prompt, is_valid in groups]


def best_of(rewards: np.ndarray, k: int) -> float:
    """Unbiased estimate of the expected best reward of k samples, from n >= k samples of one prompt.

    It is the mean, over all `C(n, k)` subsets of size k, of the largest reward in the subset: the i-th
    smallest reward (counted from 1) is the largest in `C(i-1, k-1)` of them. For rewards of 0 and 1 this is
    pass@k, `1 - C(n-c, k)/C(n, k)` with c ones (Chen et al. 2021, arXiv 2107.03374, eq. 1). It is nan for
    n < k.

    Args:
        rewards: rewards of the samples [n].
        k: size of the subsets.
    """
    n = len(rewards)
    if n < k:
        return math.nan
    subsets = math.comb(n, k)
    shares = [math.comb(i, k - 1) / subsets for i in range(n)]
    return float(np.sort(rewards) @ np.array(shares))
