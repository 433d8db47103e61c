"""Divides rows into those to train on and those to evaluate on, by a hash, and counts both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from tokenrl.errors import Refused, suggest
from tokenrl.files import canonical
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.rows import Rows, digits, hashes, prompt_key
from tokenrl.language.tasks.sources import read_splits
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


def chosen(rows: Sequence[Any], size: int | None) -> list[int]:
    """Return the numbers of at most so many of the rows, drawn by a fixed seed, in their order; None returns all."""
    return sorted(np.random.default_rng(0).permutation(len(rows))[:size].tolist())


def read_parts(
    source: Any, name: str, split: str, eval_split: str | None, make: Callable[[Rows, str], T]
) -> tuple[T, T | None, dict[str, Rows]]:
    """Read all splits of data, and make what is trained on and what is evaluated on of two of them.

    Args:
        source: a file, a folder or a hub data set by its name, or data in memory.
        name: what error messages call it.
        split: the split to train on.
        eval_split: the split to evaluate on; None for one for validation or test.
        make: checks the rows of a split, and makes something of them; it also gets what messages call them.

    Returns:
        What was made of the split to train on, and of that to evaluate on, None if there is none; all splits.

    Raises:
        Refused: the data cannot be read, or the split to train on, or the chosen one, does not exist.
    """
    splits = read_splits(source) if isinstance(source, str) else memory_splits(source)
    for needed in (split, eval_split or split):
        if needed not in splits:
            raise Refused(f"{name} has no split '{needed}'.{suggest(needed, splits)}")
    train = make(splits[split], f"{name}, split '{split}'")
    usual = [name for name in EVAL_SPLITS if name in splits and name != split]
    evaluation = eval_split or next(iter(usual), None)
    evaluated = None
    if evaluation is not None:
        evaluated = make(splits[evaluation], f"{name}, split '{evaluation}'")
    return train, evaluated, splits


def separate(
    train_rows: Rows, eval_rows: Rows | None, eval_size: int | None
) -> tuple[Rows, Rows, str]:
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
        return train_rows, eval_rows.take(chosen(eval_rows, size)), ""

    def texts(numbers: Iterable[int]) -> Iterator[str]:
        for row in train_rows.take(numbers):
            beside = {name: value for name, value in row.items() if name != "prompt"}
            yield f"{prompt_key(row['prompt'])} {canonical(beside)}"

    prompts = train_rows.hashes
    if len(np.unique(prompts)) == 1 and len({*texts(range(len(prompts)))}) == 1:
        return train_rows, train_rows.take([0] * (eval_size or EQUAL_ROWS)), EQUAL
    train, held_out, words = hold_out(prompts, texts, size)
    return train_rows.take(train), train_rows.take(held_out), words


def hold_out(
    prompts: np.ndarray, texts: Callable[[Iterable[int]], Iterable[str]], size: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Divide rows into those to train on and those held out, about a fifth, by a hash.

    A prompt is held out if its hash, a number in [0, 1), is below 1/5, or with more than 10,000 rows below
    2,000 / N. So its side depends on no seed, no order, no size and hardly on other rows. Where these are less
    than half of the rows aimed at, or more than double, the hashes still give the order of the prompts, and
    the nearest number of prompts within these bounds is held out. If no number is, as where one prompt has
    most rows, single rows are held out in the same way, and of equal rows some.

    Args:
        prompts: the hashes of the prompts of N rows, at least two.
        texts: returns the rows of some numbers as texts that equal rows share; of equal rows the number tells
            them apart.
        size: the most rows to evaluate on, of those held out.

    Returns:
        The numbers of rows to train on, in their order; those of rows to evaluate on, in the order of the hashes
        of the rows; and in words how they were divided. Each part has at least one row.
    """
    every = np.arange(len(prompts))
    held = _held_out(prompts)
    words = BY_PROMPT
    if not held.any():
        held = _held_out(hashes(texts(every)))
        words = BY_ROW
    numbers = every[held] if held.any() else every  # of equal rows all are held out or none
    order = hashes(_numbered(texts(numbers)))
    if not held.any():
        held = _held_out(order)
        numbers = every[held]
        order = order[held]
    numbers = numbers[np.argsort(order, kind="stable")]
    if len(numbers) > size:
        words = f" of {len(numbers):,}{words}"
    return every[~held], numbers[:size], words


def _numbered(texts: Iterable[str]) -> Iterator[str]:
    """Yield each text with the number of equal texts before it, which tells them apart."""
    earlier = Counter[str]()
    for text in texts:
        yield f"{text} {earlier[text]}"
        earlier[text] += 1


def _held_out(keys: np.ndarray) -> np.ndarray:
    """Return which of N rows are held out, by the hashes of their keys; none if no number is within the bounds."""
    count = len(keys)
    aim = max(1.0, min(count / 5, MOST_HELD_OUT))  # rows
    most = max(1.0, min(2 * aim, count / 2))
    ordered, rows_of = np.unique(keys, return_counts=True)
    # The first k keys in the order of their hashes have so many rows [k].
    sizes = np.cumsum(rows_of)
    is_allowed = (aim / 2 <= sizes) & (sizes <= most)
    allowed = np.flatnonzero(is_allowed) + 1
    fractions = ordered / 2.0**64
    by_rule = np.count_nonzero(fractions < aim / count)
    nearest = min(allowed, key=lambda k: abs(k - by_rule), default=0)
    return np.isin(keys, ordered[:nearest])


def division_of(
    task: Any,
    eval_size: int | None,
    models: Mapping[str, Any] | None = None,
    noun: str = "rows",
) -> tuple[str, list[str]]:
    """Describe how the rows of a task are divided: rows and prompts of either part, and what models have seen.

    Args:
        task: the task. Where it has an environment, which plays an episode of each row, equal rows are fair.
        eval_size: the number of rows to evaluate on that was given; None if it was left open.
        models: the models that take part, with their `trained_prompts`, by what the texts call them.
        noun: what the texts call rows.

    Returns:
        A line for the header. And warnings: that held-out rows have prompts or questions of the rows to train on,
        of which there are several, or that a model was trained on; or that other than `eval_size` rows are there.
    """
    trained = task.train_prompts.hashes
    evaluated = task.eval_prompts.hashes
    count = len(evaluated)
    divided = task.divided
    line = f"{counted(trained, noun)} to train on, {counted(evaluated, noun)} held out{divided}"
    keys = task.eval_prompts.keys
    texts = [*map(digits, keys)]
    parts = {"are among the rows to train on": np.isin(keys, task.train_prompts.keys)}
    for name, model in (models or {}).items():
        earlier: frozenset[str] = getattr(model, "trained_prompts", frozenset())
        parts[f"{name} was trained on"] = np.array([[*map(earlier.__contains__, x)] for x in texts])
    if task.environment or divided.endswith(BY_ROW) or len(np.unique(trained)) == 1:
        parts = {}  # the parts share prompts, which is fair
    warnings = []
    for words, is_known in parts.items():  # [K, N]
        if repeated := np.count_nonzero(is_known.any(axis=0)):
            warnings.append(
                f"{repeated:,} of the {count:,} held-out {noun} have prompts that {words}, so evaluations also "
                "show what was learnt by heart. Name a split of other prompts to evaluate on: eval_split "
                "(--eval-split)."
            )
    if eval_size not in (None, count):
        reason = "there are no more"
        if divided:
            reason = "a fifth of the data, and at most 2,000, are held out"
        warnings.append(
            f"eval_size was given as {eval_size:,}, but {count:,} {noun} are held out: {reason}."
        )
    return line, warnings


def counted(prompts: np.ndarray, noun: str = "rows") -> str:
    """Return how many rows there are, by the hashes of their prompts, and of how many prompts."""
    return f"{len(prompts):,} {noun} of {quantity(len(np.unique(prompts)), 'prompt')}"
