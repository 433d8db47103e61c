"""Two baselines of your own, each with its bias declared beside it.

    tokenrl lab exact --estimators recipes/language/own_baselines.py:median_of_others
    tokenrl compare --task sort_digits --arms rloo recipes/language/own_baselines.py:median_of_others
    tokenrl train --task sort_digits --estimator recipes/language/own_baselines.py:median_of_others

A baseline gets the return of each row [N], `group_size` rows in a row for each prompt, and returns a number
for each row. The first command checks what the attribute `bias` declares by enumeration, as it checks the
baselines of tokenrl, and ends with exit code 1 where that is wrong.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from typing import Any

import torch
from torch import Tensor

from tokenrl import Estimator, measure_bias


def median_of_others(totals: Tensor, *, group_size: int, **step: Any) -> Tensor:
    """Return the median of the returns of the prompt's other completions [N]."""
    groups = totals.view(-1, 1, group_size).expand(-1, group_size, -1)  # [B, G, G]
    itself = torch.eye(group_size, dtype=torch.bool)
    others = groups.masked_fill(itself, torch.inf).sort(-1).values[..., :-1]
    return others[..., (group_size - 2) // 2].flatten()


def largest_of_all(totals: Tensor, *, group_size: int, **step: Any) -> Tensor:
    """Return the largest return of the prompt's completions, the row itself included [N]."""
    return totals.view(-1, group_size).amax(-1).repeat_interleave(group_size)


median_of_others.bias = "exact", "the baseline is made of the other completions only"
largest_of_all.bias = "biased", "the row's own return is in the baseline"

if __name__ == "__main__":
    for baseline in (median_of_others, largest_of_all):
        verdict = measure_bias(Estimator(baseline=baseline))
        print(f"declared {verdict.declared}, found {verdict}")
