"""Opens a task, and the model of a run or any other, as `tokenrl lab measure` samples and differentiates them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.errors import Refused
from tokenrl.language.commands.arguments import OpenModelArguments
from tokenrl.language.commands.evaluate import as_in_runs
from tokenrl.language.policy.arguments import fill_form, form_line
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import Policy, load_policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.base import adapt, load_base
from tokenrl.language.supervised.defaults import completion_limit
from tokenrl.language.tasks.task import PromptTask, check_single_turn, find_task
from tokenrl.language.training.arguments import KlArguments
from tokenrl.language.training.teacher import load_teacher, with_teacher
from tokenrl.settings import part_of, shown

T = TypeVar("T", bound=OpenModelArguments)


def open_task(
    args: T, announce: Callable[[str], None], purpose: str
) -> tuple[T, PromptTask, Rewards]:
    """Return the arguments as in the run of the model, where they were left open, the task and its rewards.

    Args:
        args: the arguments.
        announce: prints a line.
        purpose: what the task is opened for, in a refusal of one with several turns.

    Raises:
        Refused: nothing names a task, or it has several turns; or as `as_in_runs` says.
    """
    args = fill_form(as_in_runs(args, announce))
    if args.task is None and args.model is not None:
        raise Refused(
            f"Name the task to measure on: task (--task). No run of one saved {shown(args.model, 100)}."
        )
    args = replace(args, task="sort_digits" if args.task is None else args.task)
    for line in form_line(args.form, args.model).values():
        announce(f"Asked: {line}.")
    task, rewards = find_task(args)
    check_single_turn(rewards, purpose)
    return args, task, rewards


def open_policy(
    args: Any, task: PromptTask, announce: Callable[[str], None]
) -> tuple[Policy, Sampling]:
    """Load the policy, on its device and with its teacher if there is one, and say how it is sampled.

    From a run that trained an adapter it is the policy in which only that adapter trains.

    Args:
        args: the arguments from `open_task`, with `teacher`, `seed`, `cpu` and the sizes of sampling.
        task: the task.
        announce: prints a line.

    Raises:
        Refused: the model or the teacher cannot be used.
    """
    loading = args
    adapter = Path(args.model, "model", "adapter") if isinstance(args.model, (str, Path)) else None
    if adapter is not None and os.path.isdir(adapter) and not args.lora_r:
        announce(f"{args.model} trained an adapter, so the gradient is measured in the adapter.")
        trained = load_policy(
            adapter, merge_adapter=False, dtype=args.dtype, trust_remote_code=args.trust_remote_code
        )
        loading = replace(loading, model=trained)
    policy = load_base(loading, task, announce)
    device = device_for(policy.size, args.cpu)
    if args.teacher is not None:
        teacher = load_teacher(KlArguments(teacher=args.teacher), args, policy)
        announce(f"Teacher: {teacher.line}.")
        assert teacher.policy is not None  # as the name is that of a model
        policy = with_teacher(policy, teacher.policy)
        teacher.policy.model.to(device)
    adapt(args, policy)
    policy.model.to(device)
    length = args.max_completion_length or completion_limit(task, args.model, policy)[0]
    return policy, part_of(replace(args, max_completion_length=length), Sampling)
