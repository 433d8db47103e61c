"""Makes a complete task of whatever a user gives: prompts, a reward, and a limit for the completion length.

A user may give a `PromptTask`, any object with its first four attributes, the name of a toy task,
`module:attribute`, any source that `datasets` reads, or data in memory. `as_task` makes a `PromptTask` of it, which
has every attribute that the package reads. Streaming and multimodal data are left out.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, describe, suggest
from tokenrl.keywords import takes
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks import records, sources
from tokenrl.language.tasks.files import format_of
from tokenrl.language.tasks.held_out import chosen, read_parts, separate
from tokenrl.language.tasks.reasoning import puzzles
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.sources import (
    PUZZLES,
    DataArguments,
    TaskArguments,
    source_of_task,
    with_prompts,
)
from tokenrl.names import import_attribute
from tokenrl.settings import arguments, shown
from tokenrl.user_code import copied, guarded


@dataclass
class PromptTask:
    """A task that is made of rows and a reward.

    Any object with `name`, `train_prompts`, `eval_prompts` and `reward` is taken as a task too. It is refused with a
    further attribute that would change a run (`SPECIFIC`); others are its own affair.

    Attributes:
        name: the task's name, for records and messages.
        train_prompts: rows to train on. A row is a mapping with a "prompt", which is text or a list of chat
            messages; its other columns are passed to the reward as keyword arguments, None where it lacks one.
        eval_prompts: rows to evaluate on.
        reward: a reward function or a list of them; it may be empty where an environment gives the rewards. A
            function may declare itself by the attributes `binary = True` or `range = (low, high)`.
        max_completion_length: the most tokens of a completion; None leaves it to the settings of the run.
        solved: the mean reward from which the task counts as solved; None if there is no such mark.
        pass_threshold: the least reward of a right completion, for pass@k; None if only `reward` can say so,
            by an attribute `binary`.
        demonstrations: rows with a `prompt` and a `completion`, for a supervised warm start.
        origin: what config.json says of data given from Python: its rows, columns and fingerprint.
        divided: how the rows to evaluate on were held out of the split to train on, in words; else empty.
        environment: a class or function that makes the environment of an episode, or a dict of them by the
            rows' column `environment`; None if a completion is a single turn.
        train: settings that the task recommends for a training, by the names of `TrainArguments`. Each holds where
            a user gives none; if the task has a `base`, for that model, and only settings that may be left open.
        base: the toy task that makes the task's own model, with `build`, `demonstrations`, `warm_start` and
            `fingerprint`; None if there is no such model.
    """

    name: str
    train_prompts: Any
    eval_prompts: Any
    reward: Any = None
    max_completion_length: int | None = None
    solved: float | None = None
    pass_threshold: float | None = None
    demonstrations: Any = field(default_factory=lambda: Rows({}, ()))
    origin: Mapping[str, Any] = field(default_factory=dict)
    divided: str = ""
    environment: Any = None
    train: Mapping[str, Any] = field(default_factory=dict)
    base: Any = None


ROWS = ("train_prompts", "eval_prompts")
"""The attributes that a task has beside its name, whatever it is for."""
SPECIFIC = (
    "environment",
    "demonstrations",
    "max_completion_length",
    "solved",
    "pass_threshold",
)
"""Attributes that are read of a `PromptTask` alone."""
TRAIN_EPISODES = 512
EVAL_EPISODES = 64
"""Rows to train and to evaluate on of a task that is an environment alone. They are all the same, but each
episode is reset with a seed of its own."""


@takes(DataArguments)
def load_task(name: Any, *, reward: Any = None, chat: bool = False, **options: Any) -> PromptTask:
    """Find a task by the name that a user gives, or make one of data.

    Args:
        name: a name in `toy_tasks`; `module:attribute` or `file.py:attribute` (a task or an environment, or a
            callable without arguments that returns one); `reasoning_gym:NAME`; a data file or a folder; or a
            hub dataset `owner/name` or `owner/name:config`. Or the data itself: a `datasets.Dataset`, a list
            of rows, or a mapping of splits such as a `DatasetDict`; or a task, or an environment's class.
        reward: a reward or a list of them that replaces the task's own: callables, or anything that
            `load_reward` takes. A dataset has no reward of its own.
        chat: make prompts of a dataset that are text messages of the user.
        options: fields of `DataArguments`: `prompt_column`, `prompt_template`, `split`, `eval_split`,
            `eval_size` and `environment`. Splits are taken as they are. Of a dataset without a split to
            evaluate on, about a fifth of the prompts is held out by a hash, see `held_out.hold_out`.

    Raises:
        Refused: there is no task of that name, its data is empty or cannot be read, a prompt is neither text
            nor chat messages, or there is no reward.
    """
    return as_task(name, arguments(DataArguments, options), reward, chat=chat)


def as_task(
    source: Any,
    data: DataArguments,
    reward: Any = None,
    *,
    chat: bool = False,
    needs_reward: bool = True,
    whole: bool = False,
) -> PromptTask:
    """Return whatever a user may give as a task, see `load_task`, as a task that is complete and checked.

    Args:
        source: a name, a task, an environment, or data.
        data: how prompts are read; its environment replaces the task's own.
        reward: a reward or a list of them that replaces the task's own.
        chat: make prompts of data that are text messages of the user.
        needs_reward: whether the task needs a reward, of functions or of an environment.
        whole: whether the task may lack rows to evaluate on.
    """
    task = own_task(source, data.eval_size, chat=chat, whole=whole)
    task = task or _of_data(source, data, chat=chat)
    held_out = task.eval_prompts.take(chosen(task.eval_prompts, data.eval_size))
    columns = {**task.train_prompts.columns, **held_out.columns}
    task.train_prompts = task.train_prompts.with_columns(columns)
    task.eval_prompts = held_out.with_columns(columns)
    if reward is not None:
        is_one = isinstance(reward, str) or not isinstance(reward, Sequence)
        functions = load_reward(reward) if is_one else list(map(load_reward, reward))
        task.reward = functions
        task.pass_threshold = None
    environment: Any = data.environment
    if isinstance(environment, str):
        environment = import_attribute(environment, "environment")
    if environment is not None and data.environment is not source:
        task.environment = environment
    if needs_reward and not task.reward and task.environment is None:
        raise Refused(
            f"The task {task.name!r} has no reward: give one with --reward module:function (or a file.py, or the "
            "folder of a reward model), from Python reward=function."
        )
    return task


def own_task(
    source: Any, eval_size: int | None = None, *, chat: bool = False, whole: bool = True
) -> PromptTask | None:
    """Return the task of a name, or the task that an object is or makes, complete and checked; None of data.

    Args:
        source: a name; a task, an environment's class, or a function without arguments that makes one of the
            two; or data.
        eval_size: rows to evaluate on of puzzles and environments; None for the usual number.
        chat: make the empty prompt of an environment a message of the user.
        whole: whether the task may lack rows to evaluate on.

    Raises:
        Refused: there is no such task, it lacks what a task needs, or its code raises an error.
    """
    name = source
    if not isinstance(source, str):
        name = getattr(source, "__name__", type(source).__name__)
    with guarded(f"task '{name}' was read", Refused):
        task = _made(source, name, eval_size, chat)
        return None if task is None else _complete(task, name, whole=whole)


def _of_data(source: Any, data: DataArguments, *, chat: bool) -> PromptTask:
    """Return the task of data, without a reward; rows to evaluate on are a split, or held out."""
    title = f"task '{source}'" if isinstance(source, str) else "task"
    make = partial(with_prompts, data=data, chat=chat)
    train, evaluated, splits = read_parts(source, title, data.split, data.eval_split, make)
    name = source
    origin: Mapping[str, Any] = {}
    if not isinstance(source, str):
        name, origin = records.described(splits)
    train, evaluated, words = separate(train, evaluated, data.eval_size)
    return PromptTask(name, train, evaluated, origin=origin, divided=words)


def _made(source: Any, name: str, eval_size: int | None, chat: bool) -> Any:
    """Return the object with the attributes of a task that `own_task` completes; None of data."""
    factory = source
    if isinstance(source, str):
        toy_tasks = importlib.import_module("toy_tasks")
        if source in toy_tasks.NAMES:
            return toy_tasks.load(source)
        if source.startswith(PUZZLES):
            return PromptTask(source, *puzzles(source, eval_size), pass_threshold=1.0)
        if not source_of_task(source) and not source.endswith(".py"):
            if (
                os.path.exists(source)
                or "/" in source
                or source.startswith(sources.IN_MEMORY)
                or format_of(Path(source)) in sources.FORMATS
            ):
                return None
            raise Refused(
                f"There is no task '{source}'.{suggest(source, toy_tasks.NAMES)} Other forms: module:attribute, "
                f"a {'/'.join(sources.FORMATS)} file, a folder, or a hub dataset owner/name."
            )
        factory = import_attribute(source, "task")
    elif not callable(source):
        return source if hasattr(source, "train_prompts") else None
    task = factory
    if callable(task) and not (hasattr(task, "reset") or hasattr(task, "train_prompts")):
        task = task()
    if not hasattr(task, "reset") or hasattr(task, "train_prompts"):
        return task
    row = {"prompt": [{"role": "user", "content": ""}] if chat else ""}
    count = eval_size or EVAL_EPISODES
    return PromptTask(name, [row] * TRAIN_EPISODES, [row] * count, environment=factory)


def _complete(task: Any, name: str, *, whole: bool) -> PromptTask:
    """Return a task, or an object with the attributes of any task, as a task that is checked.

    Prompts are as they are read from data.
    """
    is_own = isinstance(task, (PromptTask, importlib.import_module("toy_tasks").Task))
    names = [f.name for f in fields(PromptTask)] if is_own else ("name", *ROWS, "reward")
    # A property of the user's is read once.
    values = {name: x for name in names if (x := getattr(task, name, MISSING)) is not MISSING}
    missing = [attribute for attribute in ("name", *ROWS) if attribute not in values]
    if missing:
        raise Refused(
            f"task '{name}' is a {type(task).__name__} without {', '.join(missing)}: make a "
            "tokenrl.PromptTask, or give it those attributes."
        )
    title = f"task '{values['name']}'"
    unread = [name for name in SPECIFIC if not is_own and hasattr(task, name)]
    if unread:
        raise Refused(
            f"{title} is a {type(task).__name__} with {', '.join(unread)}, which only a tokenrl.PromptTask may have: "
            "make one with them."
        )
    for attribute in ("solved", "pass_threshold", "max_completion_length"):
        number = values.get(attribute)
        if number is not None and not isinstance(number, Real):
            raise Refused(f"{title}: {attribute} is {shown(number)}; give a number, or None.")
    for attribute in (*ROWS, "demonstrations"):
        rows = values.get(attribute)
        subject = f"{title}, {attribute}"
        table = Rows.of(() if rows is None else rows, subject)
        if table or (attribute in ROWS and not whole):
            table = with_prompts(table, subject, DataArguments())
        values[attribute] = table
    return PromptTask(**values)


def is_unrewarded(reward: Any) -> bool:
    """Return whether a setting of rewards names `none`, so that training gets no reward."""
    return "none" in (reward or ())


def find_task(
    args: TaskArguments, *, may_lack_rewards: bool = False, whole: bool = False
) -> tuple[PromptTask, Rewards]:
    """The task of the arguments and its rewards.

    `args.task` is a name, data as `load_task` takes it, or the task itself; the rewards are those of
    `args.reward`, else the task's own. What counts as solved or right holds for those alone, unweighted: with
    others the task has no such marks.

    Args:
        args: the arguments.
        may_lack_rewards: whether reward may be `none`. The rewards are then the task's own, for evaluations,
            or have no functions if it has none.
        whole: whether a task may have no reward and no rows to evaluate on.

    Raises:
        Refused: there is no such task or no reward, `none` stands beside other rewards or their weights, or a
            reward asks for a column that the task lacks.
    """
    unrewarded = is_unrewarded(args.reward)
    if unrewarded and (len(args.reward) > 1 or args.reward_weights or not may_lack_rewards):
        raise Refused(
            "reward none means no reward at all: it is for tokenrl train with a teacher, without rewards beside "
            "it and without reward_weights. Leave reward out for the task's own."
        )
    named = () if unrewarded else args.reward or ()
    source: Any = args.task
    chat = bool(getattr(args, "chat", None))
    reward = named or None
    is_optional = unrewarded or whole
    task = as_task(source, args, reward, chat=chat, needs_reward=not is_optional, whole=whole)
    environments = None
    if task.environment is not None:
        options = {name: getattr(args, name) for name in ("max_turns", "share_seed", "malformed")}
        environments = Environments(task.environment, timeout=args.reward_timeout, **options)
    pass_threshold = getattr(args, "pass_threshold", None)
    if reward or args.reward_weights:
        task = replace(task, solved=None)
    elif pass_threshold is None:
        pass_threshold = task.pass_threshold
    rewards = Rewards(
        task.reward or [],
        list(args.reward_weights or ()) or None,
        environments=environments,
        timeout=args.reward_timeout,
        abstains=args.on_reward_timeout == "abstain",
        abstains_on_error=args.on_reward_error == "abstain",
        leaves_out=args.on_abstain == "leave-out",
        sources=named or None,
        pass_threshold=pass_threshold,
        optional=is_optional,
    )
    rewards.check_columns(task.train_prompts.columns)
    for attribute in ROWS:
        rows = getattr(task, attribute)
        _check_copies(rows, f"task '{task.name}', {attribute}")
        rewards.check_rows(rows)
    return task, rewards


def _check_copies(rows: Rows, title: str) -> None:
    """Refuse rows with a value that cannot be copied, since each function that gets rows gets copies."""
    for name, values in rows.columns.items():
        for location, value in zip(rows.locations, values, strict=True):
            try:
                copied(value)
            except Exception as error:
                raise Refused(
                    f"{title}, {location}: column {name!r} holds {shown(value)}, which cannot be copied "
                    f"({describe(error)}), and each function gets copies of the rows. Give texts, numbers, "
                    "and lists or dicts of them; keep other objects in the module of the function."
                ) from error


def check_single_turn(rewards: Rewards, purpose: str) -> None:
    """Refuse rewards of episodes where completions of a single turn are needed; `purpose` says what for."""
    if rewards.environments is not None:
        raise Refused(
            f"{purpose} needs completions of one turn, and {rewards.environments.__name__} answers them: name "
            "a task without an environment."
        )
