"""The tasks and baselines that the study adds to those of the library.

Plans name them by this file, as `recipes/study/own.py:shifted`. All tasks start from the weights of
sort_digits.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tokenrl.language import load_task

Baseline = Callable[..., Tensor]
DIFFICULTY = Path(__file__).parent / "tables" / "difficulty.csv"
"""Each training prompt of sort_digits with the share of 64 completions that the base model had right."""


def shifted() -> Any:
    """Question 1: sort_digits with rewards of 1 and 2 instead of 0 and 1."""
    return _raised("shifted", 1.0)


def lowered() -> Any:
    """Question 6: sort_digits with rewards of -.5 and .5: no baseline is a baseline of .5 there."""
    return _raised("lowered", -0.5)


def _raised(name: str, by: float) -> Any:
    """Return sort_digits with a constant added to every reward."""
    task: Any = load_task("sort_digits")

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        return [by + value for value in task.reward(prompts, completions, **columns)]

    reward.range = (by, 1 + by)  # type: ignore[attr-defined]
    return replace(task, name=f"sort_digits_{name}", reward=reward, solved=by + task.solved)


def like() -> Any:
    """Question 2: train on the 1,024 prompts in the middle of the ranking by difficulty."""
    return _trained_on("like", slice(1536, 2560))


def unlike() -> Any:
    """Question 2: train on the 512 hardest and the 512 easiest prompts."""
    return _trained_on("unlike", slice(0, 512), slice(3584, 4096))


def uneven() -> Any:
    """Question 15: five hard prompts for each easy one, every other one of them held out."""
    return replace(
        _trained_on("uneven", slice(0, 480, 2), slice(4000, 4096, 2)),
        eval_prompts=_ranked(slice(1, 480, 2), slice(4001, 4096, 2)),
    )


def fifty() -> Any:
    """Question 16: train on 50 prompts of sort_digits, as somebody with few rows would."""
    task: Any = load_task("sort_digits")
    few = random.Random(0).sample(list(task.train_prompts), 50)
    return replace(task, name="sort_digits_fifty", train_prompts=few)


def _trained_on(name: str, *parts: slice) -> Any:
    """Return sort_digits with some of its training prompts, cut out of their ranking from hard to easy."""
    task: Any = load_task("sort_digits")
    return replace(task, name=f"sort_digits_{name}", train_prompts=_ranked(*parts))


def _ranked(*parts: slice) -> list[dict[str, str]]:
    """Return parts of the ranking of the training prompts from hard to easy."""
    with DIFFICULTY.open() as file:
        ranked = sorted(csv.DictReader(file), key=lambda row: (float(row["right"]), row["prompt"]))
    return [{"prompt": row["prompt"]} for part in parts for row in ranked[part]]


def _weighted(positive: float, negative: float) -> Baseline:
    """Question 4: the baseline with which positive and negative advantages of RLOO count by these weights."""

    def baseline(totals: Tensor, group_size: int, mask: Tensor, valid: Tensor) -> Tensor:
        groups = totals.view(-1, group_size)
        baselines = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
        advantages = (groups - baselines).flatten()
        return totals - positive * advantages.clamp(min=0) - negative * advantages.clamp(max=0)

    return baseline


positives_half, positives_quarter, positives_none = (
    _weighted(weight, 1) for weight in (0.5, 0.25, 0)
)
negatives_half, negatives_quarter, negatives_none = (
    _weighted(1, weight) for weight in (0.5, 0.25, 0)
)
