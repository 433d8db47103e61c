"""Divides rows into those to train on and those to evaluate on, which share no prompt."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenrl.errors import Refused, suggest
from tokenrl.language.tasks.sources import DataArguments, Row, with_prompts

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

    Raises:
        Refused: the size is below 1.
    """
    if eval_size is not None and eval_size < 1:
        raise Refused(f"eval_size is {eval_size}; it must be at least 1.")
    if eval_size is None or eval_size >= len(task.eval_prompts):
        return task
    chosen = np.random.default_rng(seed).permutation(len(task.eval_prompts))[:eval_size]
    return changed(task, eval_prompts=[task.eval_prompts[i] for i in sorted(chosen.tolist())])


def dataset_rows(
    splits: Mapping[str, Sequence[Row]], where: str, how: DataArguments, *, seed: int = 0, chat: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return rows to train and to evaluate on, which share no prompt.

    Args:
        splits: the rows of each split.
        where: what error messages call the data.
        how: the splits to take, how many rows are held out, and how prompts are made.
        seed: chooses the rows that are held out.
        chat: make each prompt that is text a message of the user.

    Raises:
        Refused: there is no such split, too few prompts, or a prompt cannot be made.
    """
    validation = (s for s in EVAL_SPLITS if s in splits and s != how.split)
    wanted = [how.split, how.eval_split or next(validation, None)]
    made: list[Any] = []
    for split in wanted:
        if split is not None and split not in splits:
            raise Refused(f"{where} has no split '{split}'.{suggest(split, splits)}")
        place = f"{where}, split '{split}'"
        made.append(None if split is None else with_prompts(splits[split], place, how, chat=chat))
    return _separate(made[0], made[1], 128 if how.eval_size is None else how.eval_size, seed, where)


def _separate(
    train_rows: list[dict[str, Any]],
    eval_rows: list[dict[str, Any]] | None,
    eval_size: int,
    seed: int,
    where: str,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and evaluation rows that share no prompt; without `eval_rows`, training rows are held out."""
    if eval_size < 1:
        raise Refused(f"eval_size is {eval_size}; it must be at least 1.")
    pool: dict[str, dict[str, Any]] = {}
    for row in train_rows if eval_rows is None else eval_rows:
        pool.setdefault(_canonical(row["prompt"]), row)
    size = min(eval_size, len(pool) // 2 if eval_rows is None else len(pool))
    order = np.random.default_rng(seed).permutation(len(pool))[:size]
    keys = list(pool)
    chosen = {keys[i]: pool[keys[i]] for i in sorted(order)}
    rest = [row for row in train_rows if _canonical(row["prompt"]) not in chosen]
    if not chosen or not rest:
        raise Refused(
            f"{where} has too few distinct prompts to train on some and evaluate on others: "
            f"{len(pool)} to evaluate on, {len(rest)} training rows that differ from those chosen. "
            "Give more data, another eval_split, or a smaller eval_size."
        )
    return rest, list(chosen.values())


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
