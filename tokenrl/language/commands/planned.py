"""Settles a training before anything is run or loaded, for who plans several trainings that are compared."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from tokenrl.language.policy.arguments import fill_form
from tokenrl.language.tasks.held_out import division_of
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.settings import settle, task_of
from tokenrl.language.training.teacher import read_models


class PlannedTraining(NamedTuple):
    """A training as it would be made.

    Attributes:
        args: its settings, with what was left open.
        solved: the reward from which its task counts as solved; None if the task names none.
        reward_range: the least and the greatest reward, as the reward function declares them, or None.
    """

    args: TrainArguments
    solved: float | None
    reward_range: tuple[float, float] | None


def plan_training(
    args: TrainArguments, announce: Callable[[str], None], keywords: Collection[str] = ()
) -> PlannedTraining:
    """Settle the settings of a training with its task and with the configuration of its model, without weights.

    Args:
        args: what was given.
        announce: prints a warning about the data.
        keywords: the names of settings that were given, perhaps as their defaults.

    Raises:
        Refused: settings contradict each other, or do not fit the task or the model, as far as that is known before
            the run.
    """
    args, _, task, reward, *_ = task_of(fill_form(args), 1, keywords)
    policy = read_models(args, task)
    for warning in division_of(task, args.eval_size, {"the model": policy})[1]:
        announce(f"warning: {warning}")
    return PlannedTraining(settle(args, task, policy).args, task.solved, reward.range)
