"""Finds or makes the task that a user names: prompts, a reward, and a limit for the completion length.

A task is any object with the attributes of `Task`. `load_task` makes one from the name of a toy task, from
`module:attribute`, from any source that `datasets` reads, or of data in memory. Streaming and multimodal data
are left out.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
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
from tokenrl.language.tasks.held_out import changed, eval_split, separate, smaller_evaluation
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.reasoning import PUZZLES, puzzles
from tokenrl.language.tasks.sources import DataArguments, Row, TaskArguments, with_prompts
from tokenrl.names import import_attribute
from tokenrl.settings import arguments, check_seed, shown


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
        divided: whether the rows to evaluate on were taken out of the split to train on.
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
    divided: bool = False
    environment: Any = None


TRAIN_EPISODES = 512
EVAL_EPISODES = 64
"""Rows to train and to evaluate on of a task that is an environment alone. They are all the same, but each
episode is reset with a seed of its own."""


@takes(DataArguments)
def load_task(
    name: Any, *, reward: Any = None, seed: int = 0, chat: bool = False, **options: Any
) -> Task:
    """Find a task by the name that a user gives, or make one of data.

    Args:
        name: a name in `toy_tasks`; `module:attribute` or `file.py:attribute` (a task or an environment, or a
            callable without arguments that returns one); `reasoning_gym:NAME`; a data file or a folder; or a
            hub dataset `owner/name` or `owner/name:config`. Or the data itself: a `datasets.Dataset`, a list
            of rows, or a mapping of splits such as a `DatasetDict`; or an environment's class.
        reward: a reward or a list of them that replaces the task's own: callables, or anything that
            `load_reward` takes. A dataset has no reward of its own.
        seed: seed of the choice of evaluation rows.
        chat: make prompts of a dataset that are text messages of the user.
        options: fields of `DataArguments`: `prompt_column`, `prompt_template`, `split`, `eval_split`,
            `eval_size` and `environment`. Splits are taken as they are. Of a dataset without a split to
            evaluate on, at most a fifth of the rows is held out (with `eval_size` half of them), all rows of
            a prompt together.

    Raises:
        Refused: there is no task of that name, its data is empty or cannot be read, a prompt is neither text
            nor chat messages, or there is no reward.
    """
    check_seed(seed)
    data = arguments(DataArguments, options)
    return with_environment(_loaded(name, data, reward, seed, chat), name, data.environment)


def _loaded(source: Any, data: DataArguments, reward: Any, seed: int, chat: bool) -> Task:
    """Return the task of a name, of an object that makes one, or of data."""
    if callable(source):
        name = getattr(source, "__name__", type(source).__name__)
        return _finished(_made_task(source, name, data.eval_size, chat), name, reward)
    name = source
    origin: dict[str, Any] = {}
    splits = None
    if isinstance(source, str):
        task = _named_task(source, data.eval_size, chat)
        if task is not None:
            task = _finished(task, source, reward)
            is_sized = source.startswith(PUZZLES)
            return task if is_sized else smaller_evaluation(task, data.eval_size, seed)
    else:
        splits = memory_splits(source)
        name, origin = records.described(splits)
    needs_reward = data.environment is None and not is_unrewarded(getattr(data, "reward", ()))
    if reward is None and needs_reward:
        raise Refused(
            f"task '{name}' is data, which has prompts but no reward: give one with --reward module:function "
            "(or a file.py, or the folder of a reward model), from Python reward=function."
        )
    title = "task" if splits else f"task '{name}'"
    if splits is None:
        splits = sources.read_splits(name)
    evaluation = eval_split(splits, title, data.split, data.eval_split)
    train_rows = with_prompts(splits[data.split], f"{title}, split '{data.split}'", data, chat=chat)
    held_out = None
    if evaluation is not None:
        subject = f"{title}, split '{evaluation}'"
        held_out = with_prompts(splits[evaluation], subject, data, chat=chat)
    episodic = data.environment is not None
    rows = separate(train_rows, held_out, data.eval_size, seed, title, episodic=episodic)
    task = PromptTask(name, *rows, reward, origin=origin, divided=evaluation is None)
    return _finished(task, name, reward)


def is_toy_task(name: str) -> bool:
    """Return whether a task of this name is in `toy_tasks`."""
    return name in importlib.import_module("toy_tasks").NAMES


def _named_task(name: str, eval_size: int | None, chat: bool) -> Any:
    """Return the task of this name; None if it is that of a file, a folder or a hub dataset."""
    toy_tasks = importlib.import_module("toy_tasks")
    if name in toy_tasks.NAMES:
        return toy_tasks.load(name)
    if name.startswith(PUZZLES):
        return PromptTask(name, *puzzles(name, eval_size), pass_threshold=1.0)
    source = name.rpartition(":")[0]
    if source and not os.path.exists(name) and (source.endswith(".py") or "/" not in source):
        return _made_task(import_attribute(name, "task"), name, eval_size, chat)
    if os.path.exists(name) or "/" in name or format_of(Path(name)) in sources.FORMATS:
        return None
    raise Refused(
        f"There is no task '{name}'.{suggest(name, toy_tasks.NAMES)} Other forms: module:attribute, a "
        f"{'/'.join(sources.FORMATS)} file, a folder, or a hub dataset owner/name."
    )


def limit_of(task: Any) -> int | None:
    """Return the most tokens of a completion that a task itself has, an object or by its name; else None."""
    if isinstance(task, str):
        task = _named_task(task, None, False)
    return getattr(task, "max_completion_length", None)


def _made_task(source: Any, name: str, eval_size: int | None, chat: bool) -> Any:
    """Return the task that an object is or makes; of an environment, a task of empty prompts.

    Args:
        source: a task, an environment's class, or a function without arguments that makes one of the two.
        name: its name.
        eval_size: rows to evaluate on of an environment; None for the usual number.
        chat: make an empty prompt a message of the user.
    """
    task = source
    if callable(task) and not (hasattr(task, "reset") or hasattr(task, "train_prompts")):
        with _refusing(f"task '{name}' was called without arguments, and"):
            task = task()
    if not hasattr(task, "reset") or hasattr(task, "train_prompts"):
        return task
    row = {"prompt": [{"role": "user", "content": ""}] if chat else ""}
    train_prompts = list(repeat(row, TRAIN_EPISODES))
    eval_prompts = list(repeat(row, eval_size or EVAL_EPISODES))
    return PromptTask(name, train_prompts, eval_prompts, [], environment=source)


def with_environment(task: Any, source: Any, environment: Any) -> Any:
    """Return the task with the environment of the arguments, if they name one beside the task's `source`."""
    if environment is None or environment is source:
        return task
    if isinstance(environment, str):
        environment = import_attribute(environment, "environment")
    return changed(task, environment=environment)


@contextlib.contextmanager
def _refusing(beginning: str) -> Iterator[None]:
    """Refuse a task whose own code raises an error in the block, `sys.exit` included.

    Args:
        beginning: the words of the message before "it raised".

    Raises:
        Refused: the code in the block raised an error.
    """
    try:
        yield
    except TokenrlError:
        raise
    except USER_CODE_FAILED as error:
        raise Refused(f"{beginning} {raised(error)}.") from error


def _finished(task: Any, name: str, reward: Any) -> Task:
    """Check a task, whatever its origin, and replace its reward by the user's if one is given."""
    with _refusing(f"task '{name}' was read, and"):
        required = ["name", "train_prompts", "eval_prompts"]
        if reward is None and getattr(task, "environment", None) is None:
            required.append("reward")
        missing = [attribute for attribute in required if not hasattr(task, attribute)]
        if missing:
            raise Refused(
                f"task '{name}' is a {type(task).__name__} without {', '.join(missing)}: make a "
                "tokenrl.PromptTask, or give it those attributes."
            )
        for attribute in ("train_prompts", "eval_prompts"):
            rows = getattr(task, attribute)
            if len(rows) == 0:
                raise Refused(f"task '{name}': {attribute} is empty; give at least one row.")
            sources.check_prompts(rows, f"task '{name}', {attribute}")
            read = [sources.as_prompt(row["prompt"]) for row in rows]
            if read != [row["prompt"] for row in rows]:
                rows = [{**row, "prompt": part} for row, part in zip(rows, read, strict=True)]
                task = changed(task, **{attribute: rows})
    if reward is None:
        return task
    if isinstance(reward, Sequence) and not isinstance(reward, str):
        return changed(task, reward=list(map(load_reward, reward)), pass_threshold=None)
    return changed(task, reward=load_reward(reward), pass_threshold=None)


def is_unrewarded(reward: Any) -> bool:
    """Return whether a setting of rewards names `none`, so that training gets no reward."""
    return "none" in (reward or ())


def find_task(args: TaskArguments, *, may_lack_rewards: bool = False) -> tuple[Task, Rewards]:
    """The task of the arguments and its rewards.

    `args.task` is a name, data as `load_task` takes it, or the task itself; the rewards are those of
    `args.reward`, else the task's own. What counts as solved or right holds for those alone, unweighted: with
    others the task has no such marks.

    Args:
        args: the arguments.
        may_lack_rewards: whether reward may be `none`. The rewards are then the task's own, for evaluations,
            or have no functions if it has none.

    Raises:
        Refused: there is no such task or no reward, `none` stands beside other rewards or their weights, or a
            reward asks for a column that the task lacks.
    """
    unrewarded = is_unrewarded(args.reward)
    if unrewarded and not may_lack_rewards:
        raise Refused(
            "reward none is for tokenrl train with a teacher; this command needs rewards. Name one, or leave "
            "reward out for the task's own."
        )
    if unrewarded and (len(args.reward) > 1 or args.reward_weights):
        raise Refused(
            "reward none means no reward at all: leave out the rewards beside it, and reward_weights."
        )
    named = () if unrewarded else args.reward or ()
    source: Any = args.task
    if isinstance(source, str) and source.startswith(records.IN_MEMORY):
        raise Refused(
            f"task '{source}' was data given from Python: give it again, or save it once with "
            "dataset.to_json('data.jsonl') and name data.jsonl by task (--task)."
        )
    reward = list(map(load_reward, named)) or None
    task: Any = None
    with _refusing("The task was read, and"):
        if hasattr(source, "train_prompts"):
            task = smaller_evaluation(source, args.eval_size)
    if task is None:
        task = _loaded(source, args, reward, 0, bool(getattr(args, "chat", None)))
    else:
        task = _finished(task, getattr(source, "name", type(source).__name__), reward)
    task = with_environment(task, source, args.environment)
    environments = None
    if (factory := getattr(task, "environment", None)) is not None:
        options = {name: getattr(args, name) for name in ("max_turns", "share_seed", "malformed")}
        environments = Environments(factory, timeout=args.reward_timeout, **options)
    functions = getattr(task, "reward", None) or []
    if environments is None and not (functions or unrewarded):
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
        sources=named or None,
        pass_threshold=pass_threshold,
        optional=unrewarded,
    )
    rewards.check_columns(dict.fromkeys(name for row in task.train_prompts for name in row))
    for attribute in ("train_prompts", "eval_prompts"):
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
