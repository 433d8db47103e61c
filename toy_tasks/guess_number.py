"""Guess a secret number from 1 to 15 in four turns: an environment with gymnasium's interface on text.

The policy reads the numbers that are left, as in `01-15:`, and writes a guess, as in `08`. Then it reads the
numbers that are left now, ` 01-07:` or ` 09-15:`, and so on. A text that is none of these numbers changes
nothing, and its turn is lost. The reward is 1 for the number within four turns, else 0.

Halving is the only play that always wins. A player who may still guess k times can tell at most 2^k - 1
numbers apart, as each wrong guess leaves k - 1 guesses for the numbers on one side of it. So four guesses are
just enough for 15 numbers, the first one must leave 7 on each side, and each later one must halve as well.

The demonstrations are games of guesses drawn at random from the numbers that are left. Each turn of them is a
demonstration of its own, whose prompt is the game so far; a turn ends with the end token. A number
is one token.
"""

from __future__ import annotations

import random
import re
from functools import partial
from typing import Any

from toy_tasks.models import EOS, TinyModel
from toy_tasks.task import Row, Task, WarmStart, rows, settings

_GUESS = re.compile(r"[0-9]{2}")


class GuessNumber:
    """The environment: it draws a number and says after each guess which numbers are left."""

    def __init__(self, turns: int = 4) -> None:
        """Take the number of turns; the largest number is the largest that can be found in them."""
        self._turns = turns

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        """Draw a number, which depends on the seed alone, and return the first observation."""
        self._low, self._high, self._left = 1, 2**self._turns - 1, self._turns
        self._number = random.Random(seed).randint(self._low, self._high)
        return self._observation().lstrip(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Take a guess; return observation, reward, whether the game is over, False, and nothing further."""
        self._left -= 1
        guess = int(action) if _GUESS.fullmatch(action) else 0
        right = guess == self._number
        if self._low <= guess <= self._high and not right:
            self._low, self._high = (
                (guess + 1, self._high) if guess < self._number else (self._low, guess - 1)
            )
        return self._observation(), float(right), right or self._left == 0, False, {}

    def _observation(self) -> str:
        return f" {self._low:02d}-{self._high:02d}:"


def make(seed: int = 0, turns: int = 4, eval_size: int = 128, games: int = 2048) -> Task:
    """Return the task. All its prompts are empty; an episode differs from others by the seed of its reset.

    Args:
        seed: Seed of the demonstrations.
        turns: Number of turns, from 2 to 6; the largest number is 2^turns - 1.
        eval_size: Number of prompts to evaluate on.
        games: Number of games that are demonstrated.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 2 <= turns <= 6:
        raise ValueError(f"turns={turns}; a game has from 2 to 6 turns.")
    rng = random.Random(seed)
    environment = partial(GuessNumber, turns)
    return Task(
        name="guess_number",
        description=f"Guess a number up to {2**turns - 1} in {turns} turns; demonstrations guess at random.",
        train_prompts=rows([""] * 512),
        eval_prompts=rows([""] * eval_size),
        reward=[],
        environment=environment,
        demonstrations=[row for _ in range(games) for row in _game(environment(), rng)],
        max_completion_length=2 * turns,
        solved=0.95,
        pass_threshold=1.0,
        warm_start=WarmStart(steps=1000),
        train=settings(learning_rate=5e-4, prompts_per_step=64, max_steps=200),
        build=TinyModel((*"-: ", *(f"{number:02d}" for number in range(1, 2**turns)))),
    )


def _game(environment: GuessNumber, rng: random.Random) -> list[Row]:
    """Return the turns of a game of random guesses as demonstrations."""
    observation, _ = environment.reset(seed=rng.getrandbits(31))
    history, over, turns = "", False, []
    while not over:
        low, high = map(int, observation.removesuffix(":").split("-"))
        history += observation
        guess = f"{rng.randint(low, high):02d}"
        turns.append({"prompt": history, "completion": guess})
        history += guess + EOS
        observation, _, over, _, _ = environment.step(guess)
    return turns
