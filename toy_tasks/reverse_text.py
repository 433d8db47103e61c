"""Reverse a text: `abcd>` asks for `dcba`. The reward is the share of positions that match.

The reward is dense: nearly every completion has some matches, so the rewards of a group are seldom all equal.
Most demonstrations copy the text instead of reversing it.
"""

from __future__ import annotations

import random
from typing import Any

from toy_tasks.models import TinyModel
from toy_tasks.task import Task, WarmStart, demonstrate, graded, hold_out, rows, settings

LETTERS = "abcdefghijklmnop"


@graded(0.0, 1.0)
def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return for each completion the number of matching positions over the length of the longer text."""
    scores = []
    for prompt, text in zip(prompts, completions, strict=True):
        answer = right(prompt)
        matches = sum(a == b for a, b in zip(answer, text, strict=False))
        scores.append(matches / max(len(answer), len(text), 1))
    return scores


def right(prompt: str) -> str:
    """Return the text of `prompt` backwards."""
    return prompt.removesuffix(">")[::-1]


def canonical(prompt: str) -> str:
    """Return the text or its reversal, whichever sorts first, because each is the answer to the other."""
    return min(prompt.removesuffix(">"), right(prompt))


def make(
    seed: int = 0,
    shortest: int = 4,
    longest: int = 6,
    wrong_share: float = 0.7,
    eval_size: int = 256,
    train_size: int = 4096,
) -> Task:
    """Return the task.

    Args:
        seed: Seed of the prompts and demonstrations.
        shortest: Fewest letters of a text, at least 3.
        longest: Most letters of a text, at most 24.
        wrong_share: Share of the demonstrations that copy the text.
        eval_size: Number of held-out prompts.
        train_size: The most training prompts.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 3 <= shortest <= longest <= 24:
        raise ValueError(
            f"shortest={shortest}, longest={longest}; they must satisfy 3 <= shortest <= longest <= 24."
        )
    rng = random.Random(seed)
    drawn: dict[str, None] = {}
    # twice as many, as some repeat and some are held out
    for _ in range(2 * (train_size + eval_size)):
        text = "".join(rng.choices(LETTERS, k=rng.randint(shortest, longest)))
        if text != text[::-1]:  # a palindrome's copy is its reversal
            drawn[f"{text}>"] = None
    train, held_out = hold_out(drawn, canonical, eval_size, rng)
    train = train[:train_size]
    return Task(
        name="reverse_text",
        description=f"Write {shortest} to {longest} letters backwards; most demonstrations copy them.",
        train_prompts=rows(train),
        eval_prompts=rows(held_out),
        reward=reward,
        demonstrations=demonstrate(train, right, lambda prompt: prompt[:-1], wrong_share, rng),
        max_completion_length=longest + 2,
        solved=0.9,
        warm_start=WarmStart(steps=800),
        train=settings(),
        build=TinyModel(tuple(LETTERS + ">")),
    )
