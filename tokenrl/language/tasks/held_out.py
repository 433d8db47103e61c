"""Divides rows into those to train on and those to evaluate on, loses none of them, and counts both."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from tokenrl.errors import Refused, suggest
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.sources import Row, read_splits
from tokenrl.runs.files import canonical
from tokenrl.runs.output import quantity

T = TypeVar("T")

EVAL_SPLITS = ("validation", "valid", "val", "dev", "eval", "test")
EVAL_SIZE = 128
"""The most rows of a data set to evaluate on, if eval_size is left open."""
MAX_OVERLAP = 0.1
"""From this share of held-out rows on that are trained on too, a run warns."""


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
    if eval_size is None:
        return task
    return changed(task, eval_prompts=chosen_rows(task.eval_prompts, eval_size, seed))


def chosen_rows(rows: Sequence[T], size: int, seed: Any) -> list[T]:
    """Return at most so many of the rows, in their order."""
    order = np.random.default_rng(seed).permutation(len(rows))[:size]
    return [rows[i] for i in sorted(order.tolist())]


def read_parts(
    source: Any, name: str, split: str, chosen: str | None
) -> tuple[dict[str, list[dict[str, Any]]], str | None]:
    """Read all splits of data, and find the one to evaluate on: the chosen one, else one for validation or test.

    Args:
        source: a file, a folder or a hub data set by its name, or data in memory.
        name: what error messages call it.
        split: the split to train on.
        chosen: the split to evaluate on; None if it was left open.

    Raises:
        Refused: the data cannot be read, or the split to train on, or the chosen one, does not exist.
    """
    splits = read_splits(source) if isinstance(source, str) else memory_splits(source)
    for needed in (split, chosen or split):
        if needed not in splits:
            raise Refused(f"{name} has no split '{needed}'.{suggest(needed, splits)}")
    usual = [name for name in EVAL_SPLITS if name in splits and name != split]
    return splits, chosen or next(iter(usual), None)


def separate(
    train_rows: list[dict[str, Any]],
    eval_rows: list[dict[str, Any]] | None,
    eval_size: int | None,
    seed: int,
    source: str,
    *,
    episodic: bool = False,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows to train on and to evaluate on.

    Splits stay as they are, but for the number of rows to evaluate on. Of one split, rows are held out as by
    `hold_out`: those of a prompt stay together; if there is only one prompt, those that are equal do. If all
    are, an environment still makes different episodes of them.

    Args:
        train_rows: rows to train on, with a `prompt` each.
        eval_rows: rows to evaluate on; None holds out training rows.
        eval_size: the most rows to evaluate on; of training rows at most half. None takes 128; of training
            rows at most a fifth.
        seed: chooses them.
        source: what error messages call the data.
        episodic: whether an environment plays an episode of each row.

    Raises:
        Refused: no row can be held out, as all are equal.
    """
    size = eval_size or EVAL_SIZE
    if eval_rows is not None:
        return train_rows, chosen_rows(eval_rows, size, seed)
    size = min(size, len(train_rows) // (2 if eval_size else 5))
    keys: list[Callable[[Row], Any]] = [lambda row: prompt_key(row["prompt"]), canonical]
    keys += [id] if episodic else []
    rest, held_out = hold_out(train_rows, keys, size, seed)
    if not held_out:
        raise Refused(
            f"{source}: no row can be held out to evaluate on, as all {len(train_rows):,} are equal. Give rows "
            "that differ, or a split to evaluate on: eval_split (--eval-split)."
        )
    return rest, held_out


def hold_out(
    rows: list[T], keys: Iterable[Callable[[T], Any]], size: int, seed: Any
) -> tuple[list[T], list[T]]:
    """Divide rows into those that are left to train on and those that are held out; equal keys stay together.

    Keys are taken in a random order if their rows still fit; if none does, the key of the fewest rows is.

    Args:
        rows: the rows.
        keys: functions that return the key of a row; the first that tells any two rows apart counts.
        size: the most rows to hold out, at most half of them.
        seed: seed of the order.

    Returns:
        The two parts; nothing is held out if no function tells rows apart.
    """
    for key_of in keys:
        keys_of_rows = list(map(key_of, rows))
        rows_of = Counter(keys_of_rows)
        if len(rows_of) > 1:
            break
    else:
        return rows, []
    chosen = set()
    names = list(rows_of)
    for number in np.random.default_rng(seed).permutation(len(names)).tolist():
        key = names[number]
        if rows_of[key] <= size:
            chosen.add(key)
            size -= rows_of[key]
    chosen = chosen or {min(rows_of, key=rows_of.__getitem__)}
    parts: tuple[list[T], list[T]] = ([], [])
    for row, key in zip(rows, keys_of_rows, strict=True):
        parts[key in chosen].append(row)
    return parts


def division(
    train: Sequence[Row],
    held_out: Sequence[Row],
    eval_size: int | None,
    *,
    noun: str = "rows",
    divided: bool = False,
    episodic: bool = False,
) -> tuple[str, list[str]]:
    """Describe both parts of the data: their rows, their prompts, and what is trained and evaluated on.

    Args:
        train: rows to train on, with a `prompt` each.
        held_out: rows to evaluate on.
        eval_size: the number of rows to evaluate on that was given; None if it was left open.
        noun: what the texts call rows.
        divided: whether the two were one split.
        episodic: whether an environment plays an episode of each row, so that equal rows are fair.

    Returns:
        A line for the header. And warnings: that a tenth of the held-out rows has prompts that are trained on
        too, of which there are several, or that other than `eval_size` rows are there.
    """
    trained, evaluated = map(prompt_keys, (train, held_out))
    line = f"{counted(trained, noun)} to train on, {counted(evaluated, noun)} held out"
    if divided:
        line += ", as the data has no split to evaluate on (--eval-size)"
    count = len(held_out)
    prompts = {*trained}
    repeated = sum(key in prompts for key in evaluated)
    warnings = []
    if repeated >= MAX_OVERLAP * count and repeated and len(prompts) > 1 and not episodic:
        warnings.append(
            f"{repeated:,} of the {count:,} held-out {noun} are of prompts that are trained on too, so evaluations "
            "also show what was learnt by heart. Take them out of one split, or name another to evaluate on: "
            "eval_split (--eval-split)."
        )
    if eval_size not in (None, count):
        warnings.append(
            f"eval_size was given as {eval_size:,}, but {count:,} {noun} are held out: there are no more, or they "
            f"are taken out of those to train on, of which at most half are held out and all {noun} of a prompt "
            "together."
        )
    return line, warnings


def division_of(task: Any, eval_size: int | None) -> tuple[str, list[str]]:
    """Describe how the rows of a task are divided, as `division` does."""
    return division(
        task.train_prompts,
        task.eval_prompts,
        eval_size,
        divided=getattr(task, "divided", False),
        episodic=getattr(task, "environment", None) is not None,
    )


def counted(keys: Sequence[str], noun: str = "rows") -> str:
    """Return how many rows there are, by the `prompt_keys` of each, and of how many prompts."""
    return f"{len(keys):,} {noun} of {quantity(len(set(keys)), 'prompt')}"


def prompt_keys(rows: Sequence[Row]) -> list[str]:
    """Return the prompt of each row, text or chat messages, as a text that equal prompts share."""
    return [prompt_key(row["prompt"]) for row in rows]


def prompt_key(prompt: Any) -> str:
    """Return a prompt, text or chat messages, as a text that equal prompts share."""
    return f"text {prompt}" if isinstance(prompt, str) else canonical(prompt)
