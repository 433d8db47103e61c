"""Countdown: `3,8,5=10>` asks for the three numbers joined by + and - to make the target, such as `8+5-3`.

The reward is graded: 0 for a text that is not a sum at all, 0.1 for a sum with the wrong numbers or the wrong
value, and 1 for a right one. The expression is parsed by a small grammar and never evaluated as code:

    sum = number {("+" | "-") number}        number = "0" | nonzero digit, then at most one digit

Most demonstrations just add everything up. This is the hardest of the toy tasks: the first number of the
answer already depends on which numbers will be subtracted, which is hard to compute for a model of this size.
"""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

from toy_tasks.models import TinyModel
from toy_tasks.task import Task, WarmStart, demonstrate, graded, hold_out, rows, settings

LONGEST = 32  # characters; a sum of three two-digit numbers has eight
_NUMBER = r"(?:0|[1-9][0-9]?)"
_SUM = re.compile(rf"{_NUMBER}(?:[+-]{_NUMBER})*")
_TERM = re.compile(rf"([+-]?)({_NUMBER})")


@graded(0.0, 1.0)
def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return for each completion 0 (not a sum), 0.1 (a wrong sum) or 1 (each number once, right value)."""
    return [_grade(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]


def parse(text: str) -> list[int] | None:
    """Return the signed terms of a sum such as `8+5-3`, here [8, 5, -3], or None if `text` is not a sum."""
    if len(text) > LONGEST or not _SUM.fullmatch(text):
        return None
    return [-int(number) if sign == "-" else int(number) for sign, number in _TERM.findall(text)]


def problem(prompt: str) -> tuple[list[int], int]:
    """Return the given numbers and the target of `prompt`."""
    numbers, target = prompt.removesuffix(">").split("=")
    return [int(number) for number in numbers.split(",")], int(target)


def canonical(prompt: str) -> tuple[tuple[int, ...], int]:
    """Return the numbers in ascending order, and the target."""
    numbers, target = problem(prompt)
    return tuple(sorted(numbers)), target


def add_all(prompt: str) -> str:
    """Return the sum of all given numbers, in the order given."""
    numbers, _ = problem(prompt)
    return "+".join(map(str, numbers))


def right(prompt: str) -> str:
    """Return a right expression: added numbers first, then the subtracted ones, each in the order given.

    Raises:
        ValueError: No choice of signs meets the target.
    """
    numbers, target = problem(prompt)
    for signs in itertools.product((1, -1), repeat=len(numbers)):
        signed = list(zip(signs, numbers, strict=True))
        if sum(sign * number for sign, number in signed) == target and 1 in signs:
            added = "+".join(str(number) for sign, number in signed if sign > 0)
            return added + "".join(f"-{number}" for sign, number in signed if sign < 0)
    raise ValueError(f"The prompt {prompt!r} has no solution with + and -.")


def make(seed: int = 0, largest: int = 12, wrong_share: float = 0.6, eval_size: int = 128) -> Task:
    """Return the task.

    Args:
        seed: Seed of the split and the demonstrations.
        largest: Largest given number, from 5 to 33; the smallest is 1.
        wrong_share: Share of the demonstrations that add everything up, although that misses the target.
        eval_size: Number of held-out prompts.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 5 <= largest <= 33:
        raise ValueError(f"largest={largest}; the largest given number is from 5 to 33.")
    rng = random.Random(seed)
    train, held_out = hold_out(_prompts(largest), canonical, eval_size, rng)
    return Task(
        name="countdown",
        description="Reach a target from three numbers with + and -; most demonstrations add everything up.",
        train_prompts=rows(train),
        eval_prompts=rows(held_out),
        reward=reward,
        demonstrations=demonstrate(train, right, add_all, wrong_share, rng),
        max_completion_length=10,
        solved=0.45,
        pass_threshold=1.0,
        warm_start=WarmStart(steps=500),
        train=settings(learning_rate=3e-4, max_steps=500),
        build=TinyModel(tuple("0123456789+-,=>")),
    )


def _prompts(largest: int) -> list[str]:
    """Return all problems of three numbers from 1 to `largest`, in any order, that need a subtraction."""
    found: dict[str, None] = {}
    for numbers in itertools.product(range(1, largest + 1), repeat=3):
        for signs in itertools.product((1, -1), repeat=3):
            target = sum(sign * number for sign, number in zip(signs, numbers, strict=True))
            if 0 <= target < sum(numbers):
                found[f"{','.join(map(str, numbers))}={target}>"] = None
    return list(found)


def _grade(prompt: str, text: str) -> float:
    terms = parse(text)
    if terms is None:
        return 0.0
    numbers, target = problem(prompt)
    used = sorted(abs(term) for term in terms) == sorted(numbers)
    return 1.0 if used and sum(terms) == target else 0.1
