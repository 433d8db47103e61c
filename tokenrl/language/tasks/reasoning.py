"""Makes tasks of the puzzles of reasoning-gym, which generates them by program and scores the answers.

A task is named `reasoning_gym:leg_counting` or, with options,
`reasoning_gym:leg_counting(size=200, seed=1, max_animals=4)`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from tokenrl.errors import Refused, describe, suggest
from tokenrl.language.rewards.library import completion_texts
from tokenrl.language.rewards.loading import parse_spec
from tokenrl.language.tasks.held_out import separate
from tokenrl.language.tasks.rows import Rows

SEED_DISTANCE = 2**31
"""Distance of the held-out seed from the training seed. Most puzzles draw item i from `seed + i`, so
two seeds nearer to each other than the number of items share items. NumPy takes seeds below 2**32."""


@dataclass(frozen=True)
class ReasoningScore:
    """The puzzle's own `score_answer`, in [0, 1], of the text in the last `<answer>` tag, else of all text.

    Attributes:
        generator: name of the puzzle.
        options: options of the puzzle's configuration, as sorted pairs of name and value.
    """

    generator: str
    options: tuple[tuple[str, Any], ...] = ()
    __name__ = "score_answer"

    def __call__(self, completions: Sequence[Any], entry: Sequence[Any], **_: Any) -> list[float]:
        """Score N completions, each against the puzzle in its row, `entry`."""
        rewards = []
        for text, puzzle in zip(completion_texts(completions), entry, strict=True):
            answer = text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
            rewards.append(self._puzzle.score_answer(answer, puzzle))
        return rewards

    @functools.cached_property
    def _puzzle(self) -> Any:
        import reasoning_gym

        return reasoning_gym.create_dataset(self.generator, **dict(self.options))


def puzzles(spec: str, eval_size: int | None = None) -> tuple[Rows, Rows, ReasoningScore]:
    """Make training and held-out prompts of a puzzle, from seeds that are far apart, and their reward.

    Each row has a `prompt`, an `answer` and an `entry`, which is the puzzle as `score_answer` takes it. Small
    puzzles repeat all the same. So a held-out question is kept once, and only if no training puzzle asks it;
    where all are asked there, training puzzles are held out instead, all of a question together.

    Args:
        spec: `reasoning_gym:NAME` or `reasoning_gym:NAME(option=value, ...)`. The options are `size` (500
            training puzzles), `seed` (0), and those of the puzzle's own configuration. Values are literals.
        eval_size: number of held-out puzzles; None means 128. Of puzzles that repeat there are fewer.

    Returns:
        Rows to train on, rows to evaluate on, and the reward.

    Raises:
        Refused: the package is missing, there is no such puzzle, or it does not take these options.
    """
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise Refused(f"task '{spec}' ({describe(error)}): pip install reasoning-gym.") from error
    name, options = parse_spec(
        spec.partition(":")[2].strip(), "task", "reasoning_gym:NAME(size=500, seed=0)"
    )
    if name not in DATASETS:
        raise Refused(
            f"task '{spec}': reasoning-gym has no puzzle '{name}'.{suggest(name, DATASETS)}"
        )
    options = {"size": 500, "seed": 0} | options
    try:
        train_rows = _rows(name, options)
        held_out = {"size": eval_size or 128, "seed": options["seed"] + SEED_DISTANCE}
        eval_rows = _rows(name, options | held_out)
    except Exception as error:  # configurations check themselves, by assertions too
        names = ", ".join(sorted(field.name for field in fields(DATASETS[name][1])))
        raise Refused(
            f"task '{spec}': {name} refuses these options ({describe(error)}). It takes {names}."
        ) from error
    score = ReasoningScore(name, tuple(sorted(options.items())))
    trained = set(train_rows.columns["prompt"])
    prompts = enumerate(eval_rows.columns["prompt"])
    fresh = {prompt: number for number, prompt in prompts if prompt not in trained}
    held_out_rows = eval_rows.take(fresh.values()) if fresh else None
    return *separate(train_rows, held_out_rows, eval_size)[:2], score


def _rows(name: str, options: dict[str, Any]) -> Rows:
    import reasoning_gym

    entries = reasoning_gym.create_dataset(name, **options)
    rows = (
        {"prompt": entry["question"], "answer": entry["answer"], "entry": entry}
        for entry in entries
    )
    return Rows.of(rows)
