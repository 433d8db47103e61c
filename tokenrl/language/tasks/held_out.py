"""Divides rows into those to train on and those to evaluate on, which share no prompt."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from tokenrl.errors import Refused, suggest
from tokenrl.runs.files import canonical

EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")


def changed(task: Any, **attributes: Any) -> Any:
    """Return a copy of a task with other attributes."""
    task = copy.copy(task)
    for name, value in attributes.items():
        object.__setattr__(task, name, value)  # tasks may be frozen dataclasses
    return task


def smaller_evaluation(task: Any, eval_size: int | None, seed: int = 0) -> Any:
    """Return the task with at most `eval_size` of its held-out rows, chosen with `seed`; None keeps all.

    The training rows and the demonstrations stay the same, so a model that was warm-started on them has seen
    no held-out prompt, whatever the size.

    """
    rows = task.eval_prompts
    if eval_size is None or eval_size >= len(rows):
        return task
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    chosen = sorted(order[:eval_size])
    return changed(task, eval_prompts=[rows[i] for i in chosen])


def eval_split(
    splits: Mapping[str, Any], source: str, split: str, chosen: str | None
) -> str | None:
    """Return the split to evaluate on: the chosen one, else one for validation or test if there is any.

    Raises:
        Refused: the split to train on, or the chosen one, does not exist.
    """
    for name in (split, chosen or split):
        if name not in splits:
            raise Refused(f"{source} has no split '{name}'.{suggest(name, splits)}")
    usual = [name for name in EVAL_SPLITS if name in splits and name != split]
    return chosen or next(iter(usual), None)


def separate(
    train_rows: list[dict[str, Any]],
    eval_rows: list[dict[str, Any]] | None,
    eval_size: int | None,
    seed: int,
    source: str,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and evaluation rows that share no prompt.

    Rows to evaluate on have distinct prompts; rows with one of these prompts leave the training set.

    Args:
        train_rows: rows to train on, with a `prompt` each.
        eval_rows: rows to evaluate on; None holds out training rows.
        eval_size: the most rows to evaluate on; of training rows at most half of the prompts. None takes 128;
            of training rows at most a fifth.
        seed: chooses them.
        source: what error messages call the data.

    Raises:
        Refused: nothing is left to train on, or there is nothing to evaluate on.
    """
    pool: dict[str, dict[str, Any]] = {}
    for row in train_rows if eval_rows is None else eval_rows:
        pool.setdefault(prompt_key(row["prompt"]), row)
    size = eval_size or 128
    if eval_rows is None:
        size = min(size, len(pool) // 2 if eval_size else max(1, len(pool) // 5))
    order = np.random.default_rng(seed).permutation(len(pool))[:size]
    keys = list(pool)
    held_out = {keys[i]: pool[keys[i]] for i in sorted(order)}
    rest = [row for row in train_rows if prompt_key(row["prompt"]) not in held_out]
    if not held_out or not rest:
        raise Refused(
            f"{source} has too few distinct prompts: {len(pool)} to evaluate on, {len(rest)} training rows that "
            "differ from those chosen. Give more data, or a smaller eval_size."
        )
    return rest, list(held_out.values())


def prompt_key(prompt: Any) -> str:
    """Return a prompt, text or chat messages, as a text that equal prompts share."""
    return f"text {prompt}" if isinstance(prompt, str) else canonical(prompt)
