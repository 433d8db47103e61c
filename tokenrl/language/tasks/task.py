"""Finds or makes the task that a user names: prompts, a reward, and a limit for the completion length.

A task is any object with the attributes of `Task`. `load_task` makes one from the name of a toy task, from
`module:attribute`, from any source that `datasets` reads, or of data in memory. Streaming and multimodal data
are left out.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from tokenrl.errors import (
    USER_CODE_FAILED,
    Refused,
    TokenrlError,
    describe,
    raised,
    suggest,
    with_places,
)
from tokenrl.keywords import takes
from tokenrl.language.rewards.calls import copied
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks import records, sources
from tokenrl.language.tasks.files import format_of
from tokenrl.language.tasks.held_out import changed, read_parts, separate, smaller_evaluation
from tokenrl.language.tasks.reasoning import PUZZLES, puzzles
from tokenrl.language.tasks.sources import DataArguments, Row, TaskArguments, with_prompts
from tokenrl.names import import_attribute
from tokenrl.settings import arguments, shown
from tokenrl.user_code import user_code


class Task(Protocol):
    """The attributes that training needs of a task.

    Further attributes are optional: demonstrations, recommended settings, `pass_threshold` (the least reward
    of a right completion), and `environment`. The last makes an episode of several turns of each row; then
    the reward may be an empty list.

    Attributes:
        name: the task's name, for records and messages.
        train_prompts: rows to train on. A row is a mapping with a "prompt", which is text or a list of chat
            messages; its other columns are passed to the reward as keyword arguments.
        eval_prompts: rows to evaluate on.
        reward: a reward function or a list of them. A function may declare itself by the attributes
            `binary = True` or `range = (low, high)`.
        max_completion_length: the most tokens of a completion; None leaves it to the settings of the run.
    """

    name: str
    train_prompts: Sequence[Row]
    eval_prompts: Sequence[Row]
    reward: Any  # a reward function or a list of them
    max_completion_length: int | None


@dataclass
class PromptTask:
    """A task that is made of rows and a reward.

    Attributes:
        name: the task's name, for records and messages.
        train_prompts: rows to train on, as in `Task`.
        eval_prompts: rows to evaluate on.
        reward: a reward function or a list of them.
        max_completion_length: the most tokens of a completion; None leaves it to the settings of the run.
        solved: the mean reward from which the task counts as solved; None if there is no such mark.
        pass_threshold: the least reward of a right completion, for pass@k; None if only `reward` can say so,
            by an attribute `binary`.
        demonstrations: rows with a `prompt` and a `completion`, for a supervised warm start.
        origin: what config.json says of data given from Python: its rows, columns and fingerprint.
        divided: how the rows to evaluate on were held out of the split to train on, in words; else empty.
        environment: a class or function that makes the environment of an episode, or a dict of them by the
            rows' column `environment`; None if a completion is a single turn.
    """

    name: str
    train_prompts: Sequence[Row]
    eval_prompts: Sequence[Row]
    reward: Any
    max_completion_length: int | None = None
    solved: float | None = None
    pass_threshold: float | None = None
    demonstrations: Sequence[Any] = field(default_factory=list)
    origin: Mapping[str, Any] = field(default_factory=dict)
    divided: str = ""
    environment: Any = None


REQUIRED = ("name", "train_prompts", "eval_prompts")
"""The attributes that a task has whatever it is for."""
TRAIN_EPISODES = 512
EVAL_EPISODES = 64
"""Rows to train and to evaluate on of a task that is an environment alone. They are all the same, but each
episode is reset with a seed of its own."""


@takes(DataArguments)
def load_task(name: Any, *, reward: Any = None, chat: bool = False, **options: Any) -> Task:
    """Find a task by the name that a user gives, or make one of data.

    Args:
        name: a name in `toy_tasks`; `module:attribute` or `file.py:attribute` (a task or an environment, or a
            callable without arguments that returns one); `reasoning_gym:NAME`; a data file or a folder; or a
            hub dataset `owner/name` or `owner/name:config`. Or the data itself: a `datasets.Dataset`, a list
            of rows, or a mapping of splits such as a `DatasetDict`; or an environment's class.
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
    return _loaded(name, arguments(DataArguments, options), reward, chat)


def _loaded(
    source: Any, data: DataArguments, reward: Any, chat: bool, *, whole: bool = False
) -> Task:
    """Return the task of a name, of an object or of data, checked, with the user's reward and environment."""
    name = source
    if not isinstance(source, str):
        name = getattr(source, "__name__", type(source).__name__)
    try:
        with user_code():
            task = _made(source, name, data.eval_size, chat)
            if task is not None:
                task = _checked(task, getattr(task, "name", name), whole=whole)
                task = smaller_evaluation(task, data.eval_size)
    except TokenrlError:
        raise
    except USER_CODE_FAILED as error:
        raise Refused(f"task '{name}' was read, and {raised(error)}.") from error
    if task is None:
        needs_reward = data.environment is None and not is_unrewarded(getattr(data, "reward", ()))
        if reward is None and needs_reward and not whole:
            raise Refused(
                f"task '{name}' is data, which has prompts but no reward: give one with --reward "
                "module:function (or a file.py, or the folder of a reward model), from Python reward=function."
            )
        title = f"task '{source}'" if isinstance(source, str) else "task"
        splits, evaluation = read_parts(source, title, data.split, data.eval_split)
        name, origin = source, dict[str, Any]()
        if not isinstance(source, str):
            name, origin = records.described(splits)
        subject = f"{title}, split '{data.split}'"
        train_rows = with_prompts(splits[data.split], subject, data, chat=chat)
        held_out = None
        if evaluation is not None:
            subject = f"{title}, split '{evaluation}'"
            held_out = with_prompts(splits[evaluation], subject, data, chat=chat)
        train_rows, eval_rows, words = separate(train_rows, held_out, data.eval_size)
        task = PromptTask(name, train_rows, eval_rows, None, origin=origin, divided=words)
    if reward is not None:
        is_one = isinstance(reward, str) or not isinstance(reward, Sequence)
        functions = load_reward(reward) if is_one else list(map(load_reward, reward))
        task = changed(task, reward=functions, pass_threshold=None)
    if data.environment is None or data.environment is source:
        return task  # type: ignore[no-any-return]
    environment: Any = data.environment
    if isinstance(environment, str):
        environment = import_attribute(environment, "environment")
    return changed(task, environment=environment)  # type: ignore[no-any-return]


def _made(source: Any, name: str, eval_size: int | None, chat: bool) -> Any:
    """Return the task of a name, or the task that an object is or makes; None if it is data.

    Args:
        source: a name; a task, an environment's class, or a function without arguments that makes one of the
            two; or data.
        name: its name.
        eval_size: rows to evaluate on of puzzles and environments; None for the usual number.
        chat: make the empty prompt of an environment a message of the user.
    """
    factory = source
    if isinstance(source, str):
        toy_tasks = importlib.import_module("toy_tasks")
        if source in toy_tasks.NAMES:
            return toy_tasks.load(source)
        if source.startswith(PUZZLES):
            return PromptTask(source, *puzzles(source, eval_size), pass_threshold=1.0)
        module = source.rpartition(":")[0]
        is_there = os.path.exists(source)
        is_data = is_there or not module or ("/" in module and not module.endswith(".py"))
        if is_data and not source.endswith(".py"):
            if is_there or "/" in source or format_of(Path(source)) in sources.FORMATS:
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
    train_prompts = list(repeat(row, TRAIN_EPISODES))
    eval_prompts = list(repeat(row, eval_size or EVAL_EPISODES))
    return PromptTask(name, train_prompts, eval_prompts, [], environment=factory)


def limit_of(task: Any) -> int | None:
    """Return the most tokens of a completion that a task itself has, an object or by its name; else None."""
    return getattr(_made(task, "", None, False), "max_completion_length", None)


def _checked(task: Any, name: str, *, whole: bool) -> Any:
    """Return a task, of whatever origin, with its prompts as they are read, if it has what is needed.

    Args:
        task: the task.
        name: its name.
        whole: whether it may lack rows to evaluate on.
    """
    missing = [name for name in REQUIRED if not hasattr(task, name)]
    if missing:
        raise Refused(
            f"task '{name}' is a {type(task).__name__} without {', '.join(missing)}: make a "
            "tokenrl.PromptTask, or give it those attributes."
        )
    for attribute in ("solved", "pass_threshold", "max_completion_length"):
        number = getattr(task, attribute, None)
        if number is not None and not isinstance(number, Real):
            raise Refused(f"task '{name}': {attribute} is {shown(number)}; give a number, or None.")
    for attribute in (*REQUIRED[1:], "demonstrations"):
        rows = getattr(task, attribute, None) or ()
        if len(rows) == 0 and attribute in REQUIRED and not whole:
            raise Refused(f"task '{name}': {attribute} is empty; give at least one row.")
        sources.check_prompts(rows, f"task '{name}', {attribute}")
        prompts = [sources.as_prompt(row["prompt"]) for row in rows]
        if prompts != [row["prompt"] for row in rows]:
            rows = [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)]
            task = changed(task, **{attribute: rows})
    return task


def is_unrewarded(reward: Any) -> bool:
    """Return whether a setting of rewards names `none`, so that training gets no reward."""
    return "none" in (reward or ())


def find_task(
    args: TaskArguments, *, may_lack_rewards: bool = False, whole: bool = False
) -> tuple[Task, Rewards]:
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
    if isinstance(source, str) and source.startswith(records.IN_MEMORY):
        raise Refused(
            f"task '{source}' was data given from Python: give it again, or save it once with "
            "dataset.to_parquet('data.parquet') and name data.parquet by task (--task)."
        )
    chat = bool(getattr(args, "chat", None))
    reward = list(map(load_reward, named)) or None
    task = _loaded(source, args, reward, chat, whole=whole)
    environments = None
    if (factory := getattr(task, "environment", None)) is not None:
        options = {name: getattr(args, name) for name in ("max_turns", "share_seed", "malformed")}
        environments = Environments(factory, timeout=args.reward_timeout, **options)
    functions = getattr(task, "reward", None) or []
    is_optional = unrewarded or whole
    if environments is None and not (functions or is_optional):
        raise Refused(
            f"The task {task.name!r} has no reward: name one by reward (--reward), such as module:function."
        )
    pass_threshold = getattr(args, "pass_threshold", None)
    if reward or args.reward_weights:
        task = changed(task, solved=None)
    elif pass_threshold is None:
        pass_threshold = getattr(task, "pass_threshold", None)
    rewards = Rewards(
        functions,
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
    rewards.check_columns(name for row in [*task.train_prompts, *task.eval_prompts] for name in row)
    for attribute in REQUIRED[1:]:
        _check_copies(getattr(task, attribute), f"task '{task.name}', {attribute}")
        rewards.check_rows(getattr(task, attribute))
    return task, rewards


def _check_copies(rows: Sequence[Row], title: str) -> None:
    """Refuse rows with a value that cannot be copied, since each function that gets rows gets copies."""
    for location, row in with_places(rows):
        for name, value in row.items():
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
