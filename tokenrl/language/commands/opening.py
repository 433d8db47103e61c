"""Opens the task and the model of a run, or any others, for `tokenrl evaluate`, `sample` and `lab measure`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.configuration import check_code, read_config, values_of_code
from tokenrl.errors import Refused
from tokenrl.files import plain
from tokenrl.language.commands.arguments import OpenModelArguments
from tokenrl.language.policy.arguments import fill_form, form_line, run_of
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import Policy, load_policy
from tokenrl.language.rewards.calls import TrainerState
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.allowed import with_allowed
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.base import adapt, load_base, policy_of
from tokenrl.language.supervised.defaults import completion_limit
from tokenrl.language.tasks.sources import IN_MEMORY, TaskArguments
from tokenrl.language.tasks.task import PromptTask, check_single_turn, find_task, own_task
from tokenrl.language.training.arguments import KlArguments
from tokenrl.language.training.teacher import load_teacher, with_teacher
from tokenrl.runs.output import visible
from tokenrl.runs.reader import read_run
from tokenrl.settings import arguments, field_types, lay, part_of, shown

T = TypeVar("T")
M = TypeVar("M", bound=OpenModelArguments)


def models_of(args: Any) -> tuple[str, ...]:
    """Return the models that arguments name."""
    return args.model if isinstance(args.model, tuple) else (args.model,)


def remark(words: str) -> None:
    """Print a remark or a warning on the standard error."""
    print(visible(f"tokenrl: {words}"), file=sys.stderr)


def as_in_runs(args: T, announce: Callable[[str], None] = remark) -> T:
    """Lay arguments over the settings of the runs that saved the models, and these over the usual values.

    Args:
        args: the arguments of `tokenrl evaluate`, `tokenrl sample` or `tokenrl lab measure`, of which some are
            open.
        announce: prints what was taken from the runs.

    Raises:
        Refused: the runs differ in a setting, one was given objects of a Python program, which have no name, or
            code would be executed that a run names and this user did not (see `check_code`).
    """
    choices: Any = args
    usual = {f.name: f.metadata["usual"] for f in fields(choices) if "usual" in f.metadata}
    usual["task"] = choices.environment or usual["task"]
    from_runs = dict[str, Any]()
    runs = []
    for model in filter(run_of, models_of(choices)):
        runs.append(model)
        for name, value in _of_run(choices, model, {*usual}).items():
            if from_runs.setdefault(name, value) != value and name != "seed":
                raise Refused(
                    f"The runs of {', '.join(runs)} differ in {name}, {from_runs[name]} and {value}: give {name} "
                    f"(--{name.replace('_', '-')})."
                )
    layers = ("default", usual), ("run", from_runs), ("given", vars(args))
    settled = arguments(type(args), lay(*layers)[0])
    texts = []
    for name in from_runs:
        value = getattr(settled, name)
        if value != usual[name]:
            words = value if isinstance(value, tuple) else [value]
            texts.append(" ".join(map(str, [name, *words])))
    if texts:
        announce(f"as in the run of {', '.join(runs)}: {', '.join(texts)}")
    return settled


def _of_run(args: Any, model: str, names: set[str]) -> dict[str, Any]:
    """Return the settings of the run that saved a model which count for arguments that leave them open.

    Of another task neither the data nor the rewards are the run's, nor the length if that task has its own.

    Args:
        args: the arguments.
        model: the model, as it was named.
        names: the settings that a run can decide.
    """
    run = run_of(model)
    assert run is not None
    config = read_config(run)
    if args.reward is not None and plain(args.reward) != config.get("reward"):
        names = names - {"reward_weights"}
    if not _is_task_of(args.task, str(config.get("task"))):
        names = names - {*field_types(TaskArguments)}
        own = own_task(args.task)
        if own and own.max_completion_length:
            names -= {"max_completion_length"}
    left_open = [name for name in vars(args) if getattr(args, name) is None]
    settings = {name: config[name] for name in left_open if name in names & config.keys()}
    # Objects of a Python program have no name elsewhere.
    objects = str([value for *_, value in values_of_code(type(args), settings)])
    has_objects = args.task is None or re.search("<|__main__:", objects)
    if config.get("command") == "" and has_objects:
        raise Refused(
            f"The run of {model} was given objects of a Python program, which have no name here: say with "
            "task (--task) what it was trained on, and with reward (--reward) and environment "
            "(--environment) by what."
        )
    check_code(type(args), settings, run, config, trusted=args.trust_run)
    return settings


def _is_task_of(task: Any, recorded: str) -> bool:
    """Return whether a task is that of a run; data from Python is, if the run was given data from Python too."""
    if isinstance(task, str | None):
        name = task or recorded
    else:
        own = own_task(task)
        name = own.name if own else IN_MEMORY
    return name == recorded or (name == IN_MEMORY and recorded.startswith(IN_MEMORY))


def state_of(model: str) -> TrainerState:
    """Return how far the run was that saved a model, for reward functions; as outside of a run without one."""
    path = run_of(model)
    if path is None:
        return TrainerState()
    run = read_run(path)
    name = Path(model).resolve().name
    last = len(run.metrics) - 1
    step = int(name.removeprefix("step_")) if re.fullmatch("step_[0-9]+", name) else last
    epoch = run.metrics[step].get("epoch", 0.0)
    return TrainerState(step, run.config.get("max_steps") or 1, epoch)


def open_task(
    args: M, announce: Callable[[str], None], purpose: str
) -> tuple[M, PromptTask, Rewards]:
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
    if args.teacher is not None:
        teacher = load_teacher(KlArguments(teacher=args.teacher), args, policy)
        announce(f"Teacher: {teacher.line}.")
        assert teacher.policy is not None  # as the name is that of a model
        policy = with_teacher(policy, teacher.policy)
    adapt(args, policy)
    length = place(args, policy, args.model, task, announce)
    if policy.reference is not None:
        policy.reference.to(policy.device)
    sampling = part_of(replace(args, max_completion_length=length), Sampling)
    return policy, with_allowed(policy, chain(task.train_prompts, task.eval_prompts), sampling)


def load_saved(args: Any, model: str) -> Policy:
    """Load a model as it was named, and ask it as the arguments say.

    Raises:
        Refused: the model cannot be loaded, or cannot be asked so.
    """
    policy = policy_of(model, args)
    policy.ask(args.form)
    return policy


def place(
    args: Any,
    policy: Policy,
    model: Any,
    task: PromptTask,
    announce: Callable[[str], None] = remark,
    length: int = 256,
) -> int:
    """Move a policy to the device on which it is computed, and print how it is asked; return the limit of a completion.

    Args:
        args: the arguments of `tokenrl evaluate`, `tokenrl sample` or `tokenrl lab measure`.
        policy: the policy.
        model: the model as it was named.
        task: the task.
        announce: prints a line.
        length: the limit where neither the arguments nor the task have one.
    """
    for line in form_line(policy.form, model).values():
        announce(f"asked: {line}")
    policy.model.to(device_for(policy.size, getattr(args, "cpu", None)))
    truncate = getattr(args, "truncate_prompts", False)
    limit: int | None = args.max_completion_length
    return limit or completion_limit(task, model, policy, length, truncate)[0]
