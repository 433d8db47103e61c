"""Divides rows into those to train on and those to evaluate on, by a hash, and counts both."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from itertools import accumulate, count
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
MOST_HELD_OUT = 2_000
"""Rows of a large data set that are held out of those to train on."""
EQUAL_ROWS = 64
"""Rows to evaluate on where all rows are equal."""
BY_PROMPT = " (whole prompts, by their hash)"
BY_ROW = " (single rows, by their hash, as a few prompts have most rows; both parts have the same prompts)"
EQUAL = " (all rows are equal, so evaluations sample new completions of the same prompt)"
"""How rows were held out of those to train on, in words."""


def smaller_evaluation(task: Any, eval_size: int | None) -> Any:
    """Return the task with at most `eval_size` of its held-out rows; None keeps all.

    The training rows and the demonstrations stay the same, so a model that was warm-started on them has seen
    no held-out prompt, whatever the size.

    """
    if eval_size is None:
        return task
    return replace(task, eval_prompts=chosen_rows(task.eval_prompts, eval_size))


def chosen_rows(rows: Sequence[T], size: int) -> list[T]:
    """Return at most so many of the rows, drawn by a fixed seed, in their order."""
    order = np.random.default_rng(0).permutation(len(rows))[:size]
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
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Return the rows to train on, those to evaluate on, and in words how the two were divided.

    Splits stay as they are, but for the number of rows to evaluate on. Of one split, rows are held out as by
    `hold_out`. If all rows are equal, all are trained on, and evaluations sample completions of their prompt.

    Args:
        train_rows: rows to train on, with a `prompt` each.
        eval_rows: rows to evaluate on; None holds out training rows.
        eval_size: the most rows to evaluate on; None takes 128, or 64 of equal ones.

    Returns:
        The rows of either kind, and what of the division a header says; empty for splits.
    """
    size = eval_size or EVAL_SIZE
    if eval_rows is not None:
        return train_rows, chosen_rows(eval_rows, size), ""
    prompts = prompt_keys(train_rows)
    texts = []
    for prompt, row in zip(prompts, train_rows, strict=True):
        beside = {name: value for name, value in row.items() if name != "prompt"}
        texts.append(f"{prompt} {canonical(beside)}")
    if len({*texts}) == 1:
        return train_rows, train_rows[:1] * (eval_size or EQUAL_ROWS), EQUAL
    return hold_out(train_rows, prompts, texts, size)


def hold_out(
    rows: Sequence[T], prompts: Sequence[str], texts: Sequence[str], size: int
) -> tuple[list[T], list[T], str]:
    """Divide rows into those to train on and those held out, about a fifth, by a hash.

    A prompt is held out if its hash, a number in [0, 1), is below 1/5, or with more than 10,000 rows below
    2,000 / N. So its side depends on no seed, no order, no size and hardly on other rows. Where these are less
    than half of the rows aimed at, or more than double, the hashes still give the order of the prompts, and
    the nearest number of prompts within these bounds is held out. If no number is, as where one prompt has
    most rows, single rows are held out in the same way, and of equal rows some.

    Args:
        rows: N rows, at least two.
        prompts: the prompt of each row, as a text that equal prompts share.
        texts: each row as a text that equal rows share; of equal rows the number tells them apart.
        size: the most rows to evaluate on, of those held out.

    Returns:
        Rows to train on, in their order; rows to evaluate on, in the order of the hashes of the rows; and in
        words how they were divided. Each part has at least one row.
    """
    # The number of equal texts before it tells a text apart.
    earlier = defaultdict[str, Iterator[int]](count)
    numbered = [f"{text} {next(earlier[text])}" for text in texts]
    for keys, words in ((prompts, BY_PROMPT), (texts, BY_ROW), (numbered, BY_ROW)):  # noqa: B007
        if chosen := _held_out(keys):
            break
    parts: tuple[list[int], list[int]] = ([], [])
    for number, key in enumerate(keys):
        parts[key in chosen].append(number)
    held_out = sorted(parts[1], key=lambda number: _hash(numbered[number]))
    if len(held_out) > size:
        words = f" of {len(held_out):,}{words}"
    return [rows[i] for i in parts[0]], [rows[i] for i in held_out[:size]], words


def _held_out(keys: Sequence[str]) -> set[str]:
    """Return the keys that are held out, of the keys of N rows; none if no number of them is within the bounds."""
    rows_of = Counter(keys)
    hashes = {key: _hash(key) for key in rows_of}
    aim = max(1.0, min(len(keys) / 5, MOST_HELD_OUT))
    most = max(1.0, min(2 * aim, len(keys) / 2))
    order = sorted(rows_of, key=hashes.__getitem__)
    counts = enumerate(accumulate(rows_of[key] for key in order), 1)
    allowed = [number for number, count in counts if aim / 2 <= count <= most]
    below = sum(share < aim / len(keys) for share in hashes.values())
    nearest = min(allowed, key=lambda number: abs(number - below), default=0)
    return {*order[:nearest]}


def division(
    train: Sequence[Row],
    held_out: Sequence[Row],
    eval_size: int | None,
    *,
    noun: str = "rows",
    divided: str = "",
    models: Mapping[str, Any] | None = None,
    episodic: bool = False,
) -> tuple[str, list[str]]:
    """Describe both parts of the data: their rows, their prompts, and what is trained and evaluated on.

    Args:
        train: rows to train on, with a `prompt` each.
        held_out: rows to evaluate on.
        eval_size: the number of rows to evaluate on that was given; None if it was left open.
        noun: what the texts call rows.
        divided: how the two were divided, in words, if they were one split.
        models: the models that take part, with their `trained_prompts`, by what the texts call them.
        episodic: whether an environment plays an episode of each row, so that equal rows are fair.

    Returns:
        A line for the header. And warnings: that held-out rows have prompts that are trained on too, of which
        there are several, or that a model was trained on; or that other than `eval_size` rows are there.
    """
    trained, evaluated = map(prompt_keys, (train, held_out))
    line = f"{counted(trained, noun)} to train on, {counted(evaluated, noun)} held out{divided}"
    count = len(held_out)
    shares_prompts = episodic or divided.endswith(BY_ROW) or len({*trained}) == 1
    parts = {"are trained on too": trained_prompts(train)}
    for name, model in (models or {}).items():
        parts[f"{name} was trained on"] = getattr(model, "trained_prompts", frozenset())
    warnings = []
    for words, hashes in parts.items():
        repeated = sum(digits in hashes for digits in map(_digits, evaluated))
        if repeated and not shares_prompts:
            warnings.append(
                f"{repeated:,} of the {count:,} held-out {noun} have prompts that {words}, so evaluations also "
                "show what was learnt by heart. Name a split of other prompts to evaluate on: eval_split "
                "(--eval-split)."
            )
    if eval_size not in (None, count):
        reason = (
            "a fifth of the data, and at most 2,000, are held out"
            if divided
            else "there are no more"
        )
        warnings.append(
            f"eval_size was given as {eval_size:,}, but {count:,} {noun} are held out: {reason}."
        )
    return line, warnings


def division_of(
    task: Any, eval_size: int | None, models: Mapping[str, Any] | None = None
) -> tuple[str, list[str]]:
    """Describe how the rows of a task are divided, as `division` does."""
    return division(
        task.train_prompts,
        task.eval_prompts,
        eval_size,
        divided=task.divided,
        models=models,
        episodic=task.environment is not None,
    )


def counted(keys: Sequence[str], noun: str = "rows") -> str:
    """Return how many rows there are, by the `prompt_keys` of each, and of how many prompts."""
    return f"{len(keys):,} {noun} of {quantity(len(set(keys)), 'prompt')}"


def prompt_keys(rows: Sequence[Row]) -> list[str]:
    """Return the prompt of each row, text or chat messages, as a text that equal prompts share."""
    return [prompt_key(row["prompt"]) for row in rows]


def prompt_key(prompt: Any) -> str:
    """Return a prompt as a text that equal prompts share; a single message of the user counts as its text."""
    is_single = not isinstance(prompt, str) and len(prompt) == 1
    if is_single and prompt[0] == {"role": "user", "content": prompt[0].get("content")}:
        prompt = prompt[0]["content"]
    return f"text {prompt}" if isinstance(prompt, str) else canonical(prompt)


def trained_prompts(rows: Sequence[Row]) -> frozenset[str]:
    """Return the hashes of the prompts of rows, as the file of a run holds them."""
    return frozenset(map(_digits, prompt_keys(rows)))


def _digits(key: str) -> str:
    """Return 16 hexadecimal digits that are the hash of a prompt or of a row."""
    return sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _hash(key: str) -> float:
    """Return the hash of a prompt or of a row as a number in [0, 1)."""
    return int(_digits(key)[:12], 16) / 2**48
