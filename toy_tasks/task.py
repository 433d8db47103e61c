"""Defines a toy task: prompts, a reward, demonstrations, and a tiny model of the right size for them."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from toy_tasks.models import TinyModel

Row = dict[str, Any]


@dataclass(frozen=True)
class WarmStart:
    """The supervised stage on the demonstrations that comes before reinforcement learning.

    Attributes:
        steps: Optimiser steps.
        batch_size: Demonstrations per step.
        learning_rate: Step size of the optimiser (AdamW).
        seed: Seed of the order of the demonstrations.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """One toy task, with everything that training and evaluation need to know about it.

    Attributes:
        name: The name under which `toy_tasks.load` finds it.
        description: One sentence that describes the task to people.
        train_prompts: Rows with a `prompt` (str) and any other columns, which the reward gets as lists.
        eval_prompts: Held-out rows of the same columns; no prompt has the canonical form of a training one.
        reward: A pure function `reward(prompts, completions, **columns) -> list[float]`; an empty list where
            an environment gives the rewards.
        demonstrations: Rows `{"prompt", "completion"}` for the warm start; empty where none is needed.
        max_completion_length: The most tokens that a completion may have, the end token included, as the
            tokenizer of the task's own model counts them.
        solved: Mean reward of greedy completions of the held-out prompts that counts as solved.
        pass_threshold: Least reward of a right completion; None where the reward is binary, which says so
            itself, or where no completion is simply right.
        warm_start: Settings of the supervised stage of the task's own model, or None to start from random
            weights.
        train: Training settings recommended for the task's own model, with the names of the trainer's
            arguments.
        environment: A class or function that makes the environment of an episode of several turns; None if a
            completion is a single turn.
        build: Makes a randomly initialised model and its tokenizer from a seed.
        fingerprint: Hash of everything that a warm-started base depends on besides the seed of its weights:
            the demonstrations, the tokenizer, the model's shape and the warm start. Caches use it as a key.
    """

    name: str
    description: str
    train_prompts: list[Row]
    eval_prompts: list[Row]
    reward: Any
    demonstrations: list[Row]
    max_completion_length: int
    solved: float
    warm_start: WarmStart | None
    train: dict[str, Any]
    build: TinyModel
    pass_threshold: float | None = None
    environment: Callable[[], Any] | None = None
    # It is not an argument, so dataclasses.replace(task, demonstrations=...) cannot keep an outdated hash.
    fingerprint: str = field(init=False)

    @property
    def base(self) -> Task:
        """The task that makes the task's own model: this one."""
        return self

    def __post_init__(self) -> None:
        parts = {
            "demonstrations": self.demonstrations,
            "build": asdict(self.build),
            "warm_start": asdict(self.warm_start) if self.warm_start else None,
        }
        text = json.dumps(parts, sort_keys=True)
        object.__setattr__(self, "fingerprint", hashlib.sha256(text.encode()).hexdigest()[:16])


def binary(reward: Callable[..., list[float]]) -> Callable[..., list[float]]:
    """Declare that a reward is 1 for a right completion and 0 for a wrong one, which makes it pass@k."""
    reward.binary = True  # type: ignore[attr-defined]
    return reward


def graded(
    low: float, high: float
) -> Callable[[Callable[..., list[float]]], Callable[..., list[float]]]:
    """Declare the least and the largest value of a reward with more than two values."""

    def declare(reward: Callable[..., list[float]]) -> Callable[..., list[float]]:
        reward.range = (low, high)  # type: ignore[attr-defined]
        return reward

    return declare


def settings(**changes: Any) -> dict[str, Any]:
    """Return the training settings that most tasks recommend, with the changes of one task."""
    common = {"prompts_per_step": 16, "num_generations": 8, "learning_rate": 2e-4, "max_steps": 400}
    return {**common, "lr_scheduler_type": "linear", "eval_every": 50, **changes}


def hold_out(
    prompts: Iterable[str], canonical: Callable[[str], Hashable], eval_size: int, rng: random.Random
) -> tuple[list[str], list[str]]:
    """Split distinct prompts into training and held-out ones that share no canonical form.

    The held-out forms are drawn at random. The evaluation set gets one prompt of each, so it has no
    near-duplicates; the other prompts of a held-out form are in neither set.

    Args:
        prompts: Distinct prompts.
        canonical: Maps a prompt to its form, which is equal for prompts with essentially the same answer.
        eval_size: Number of held-out prompts, and of held-out forms.
        rng: Source of the random choice, which also shuffles the training prompts.

    Raises:
        ValueError: `eval_size` leaves fewer than half of the forms for training, or is below 1.
    """
    shuffled = list(prompts)
    rng.shuffle(shuffled)
    first: dict[Hashable, str] = {}
    for prompt in shuffled:
        first.setdefault(canonical(prompt), prompt)
    if not 1 <= eval_size <= len(first) // 2:
        raise ValueError(
            f"eval_size={eval_size} of {len(first)} essentially different prompts; choose from 1 to "
            f"{len(first) // 2}, which leaves at least half for training."
        )
    held_out = dict(list(first.items())[:eval_size])
    train = [prompt for prompt in shuffled if canonical(prompt) not in held_out]
    return train, list(held_out.values())


def rows(prompts: Iterable[str]) -> list[Row]:
    """Return one row for each prompt, with no other column."""
    return [{"prompt": prompt} for prompt in prompts]


def demonstrate(
    prompts: list[str],
    right: Callable[[str], str],
    wrong: Callable[[str], str],
    wrong_share: float,
    rng: random.Random,
) -> list[Row]:
    """Return one demonstration per prompt, an exact share of them wrong, in random order.

    The wrong ones should all be wrong in the same way. Random errors average out in a greedy completion,
    which would then be right before any reinforcement learning. A consistent wrong majority does not average
    out, and the right minority is still sampled often enough to be reinforced.

    Args:
        prompts: Training prompts, for each of which `right` and `wrong` differ.
        right: The completion with the highest reward.
        wrong: The completion of the wrong majority.
        wrong_share: Share of wrong demonstrations, from 0 to 1; their number is rounded to a whole one.
        rng: Decides which prompts are answered wrongly.

    Raises:
        ValueError: `wrong_share` is not from 0 to 1.
    """
    if not 0 <= wrong_share <= 1:
        raise ValueError(
            f"wrong_share={wrong_share}; it is a share of the demonstrations, from 0 to 1."
        )
    order = list(prompts)
    rng.shuffle(order)
    cut = round(wrong_share * len(order))
    answered = [(prompt, wrong(prompt)) for prompt in order[:cut]]
    answered += [(prompt, right(prompt)) for prompt in order[cut:]]
    rng.shuffle(answered)
    return [{"prompt": prompt, "completion": completion} for prompt, completion in answered]
