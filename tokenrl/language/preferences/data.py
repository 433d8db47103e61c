"""Loads what a reward model is trained from: pairs from a file or from a task, and the backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, Stopped, describe
from tokenrl.language.policy.arguments import ModelArguments
from tokenrl.language.policy.prompts import form_of
from tokenrl.language.preferences.backbone import reward_backbone
from tokenrl.language.preferences.pairs import Pair, load_pairs, read_pairs
from tokenrl.language.preferences.sampled import make_preferences
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rollout.agreement import agree
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.defaults import length_of
from tokenrl.language.training.setup import make_policy
from tokenrl.language.training.warm_start import warm_started_base
from tokenrl.runs.threads import choose_threads, using_threads

HELD_OUT = 2**32  # added to the seed, so that held-out and training pairs use different random numbers


@dataclass(frozen=True)
class RewardData:
    """Pairs to train on and to evaluate on.

    Attributes:
        name: name of the data, for people.
        train: the pairs to train on.
        held_out: the pairs to evaluate on; their prompts are not in `train`.
        task: the task that the pairs were made from, or whose base model is the backbone; None for neither.
        rows: the rows to save in the run directory, by file name; empty if the data was given.
    """

    name: str
    train: list[Pair]
    held_out: list[Pair]
    task: Any = None
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def load_reward_data(args: Any, announce: Callable[[str], None]) -> RewardData:
    """Read the pairs that the arguments name, or make them from the task.

    Args:
        args: a `RewardModelArguments`.
        announce: prints a line for people, before and after long work.

    Raises:
        Refused: neither data nor a task is named, or it cannot be used.
    """
    if args.data is None and args.task is None:
        said = "Name the preferences to learn from: --data FILE with the columns prompt, chosen and rejected"
        raise Refused(f"{said}, or --task NAME to make them from a task's policy and reward.")
    task = rewards = None
    if args.task is not None:
        task, rewards = find_task(TaskArguments(task=args.task, reward=args.reward))
    if args.data is not None:
        name = args.data if isinstance(args.data, str | Path) else "data in memory"
        options = {"split": args.split, "eval_split": args.eval_split, "eval_size": args.eval_size}
        return RewardData(str(name), *load_pairs(args.data, seed=args.seed, **options), task)
    assert task is not None
    return _from_task(args, task, rewards, announce)


def _from_task(args: Any, task: Any, rewards: Any, announce: Callable[[str], None]) -> RewardData:
    named = args.policy
    if named is None and getattr(task, "build", None) is None:
        named = args.model
    asked = ModelArguments(model=named, base_seed=args.base_seed, **vars(form_of(args)))
    policy = make_policy(asked, task, announce)
    agree(policy, gradient=False)
    length = args.max_completion_length or length_of(task, named, policy)

    def made(prompts: Sequence[Any], wanted: int, seed: int) -> list[dict[str, Any]]:
        per_prompt = math.ceil(wanted / len(prompts))
        chosen = prompts[: math.ceil(wanted / per_prompt)]
        sampling = Sampling(length, 2 * per_prompt, args.temperature, seed)
        return make_preferences(policy, chosen, rewards, sampling, noise_temperature=args.noise_temperature)

    try:
        with using_threads(choose_threads(policy.size, args.threads)[0]):
            rows = {
                "preferences.jsonl": made(task.train_prompts, args.num_pairs, args.seed),
                "preferences_eval.jsonl": made(task.eval_prompts, args.eval_size, HELD_OUT + args.seed),
            }
    except Stopped as error:
        raise Refused(f"Before the first step: {error}") from error
    count = len(rows["preferences.jsonl"])
    announce(f"{count:,} preferences from {args.num_pairs:,} sampled pairs; the others are ties.")
    train, held_out = (read_pairs(part, name) for name, part in rows.items())
    return RewardData(task.name, train, held_out, task, rows)


def make_backbone(args: Any, task: Any, announce: Callable[[str], None]) -> RewardModel:
    """Make a reward model from the model that the arguments name, or else from the task's tiny model.

    Raises:
        Refused: there is no model, it cannot be used, or `hidden_size` does not fit it.
    """
    if args.model is not None:
        if args.hidden_size is not None:
            raise Refused(
                f"hidden_size={args.hidden_size} is for a task's own tiny model; leave out one of both."
            )
        return reward_backbone(args.model, seed=args.seed)
    if task is None:
        raise Refused("Name a model to start from: --model DIRECTORY_OR_HUB_NAME, or --task for its own.")
    if args.hidden_size is not None:
        try:  # a task may have no tiny model, or one whose heads do not divide this width
            task = replace(task, build=replace(task.build, hidden=args.hidden_size))
            task.build(0)
        except (AttributeError, TypeError, ValueError) as error:
            raise Refused(f"hidden_size={args.hidden_size} does not fit: {describe(error)}") from error
    base = warm_started_base(task, seed=args.base_seed, announce=announce)
    return reward_backbone(str(base), seed=args.seed)
