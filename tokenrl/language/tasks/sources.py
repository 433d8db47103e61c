"""Reads data files, folders and hub datasets, and makes checked prompts of their rows, as arguments say how.

Everything here runs before the first step, so whatever goes wrong is `Refused`.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

from tokenrl.errors import Placed, Refused, refusing, suggest, with_places
from tokenrl.language.policy.arguments import WRITTEN
from tokenrl.language.rewards.library import source_of_reward
from tokenrl.language.tasks.files import COMPRESSED, HALF_OF_PAIR, format_of, read_rows
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.rows import Rows, question_of
from tokenrl.language.tasks.templates import filled
from tokenrl.names import NamesCode, source_of
from tokenrl.runs.output import without_progress_bars
from tokenrl.settings import OR_OBJECT, Bounds, Count, Number, Settings, shown

FORMAT_HINT = "Rows are objects of JSON, or lines of CSV below a header that names their columns."
CACHE_HINT = (
    "The hub needs a network or a copy in the cache of datasets (HF_DATASETS_CACHE), which must be writable; "
    "if it is damaged, delete it."
)
FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""By the ending of a file, what it is read as."""
IN_MEMORY = "in-memory:"
"""How the names of data given from Python begin; a fingerprint of the rows follows."""
PUZZLES = "reasoning_gym:"
"""How the names of puzzles of reasoning-gym begin."""


def source_of_task(name: str) -> str:
    """Return the module or the file that a named task is imported from; empty for data, puzzles and toy tasks."""
    module = source_of(name)
    is_data = os.path.exists(name) or ("/" in module and not module.endswith(".py"))
    is_made = name in import_module("toy_tasks").NAMES or name.startswith((PUZZLES, IN_MEMORY))
    return "" if is_made or (is_data and not name.endswith(".py")) else module


Task = Annotated[str, OR_OBJECT, NamesCode(source_of_task)]
"""The type of a field that names a task."""
RewardNames = Annotated[tuple[str, ...], OR_OBJECT, NamesCode(source_of_reward)]
"""The type of a field that names rewards."""


class LeftOut(str):
    """The default name of a task, which has a type of its own so that the same name can also be given."""


LEFT_OUT = LeftOut("sort_digits")


@dataclass(frozen=True)
class DataArguments(Settings, group="data", measured=True):
    """How prompts are read, and how rewards are weighted and called."""

    reward_weights: tuple[Number, ...] = ()
    """One weight per reward. Default: 1 for each."""
    reward_timeout: Annotated[float, Bounds(above=0, at_most=1e6)] | None = None
    """Seconds that one call of a reward function may take. Each function then runs in a process of its own,
    which is killed at the deadline; on_reward_timeout says what follows. Reward models are exempt. It also
    bounds one call of an environment, whose episode then ends as timeout, and the run goes on. Default: no
    deadline."""
    on_reward_timeout: Literal["stop", "abstain"] = "stop"
    """What follows on a reward function that misses the deadline. stop: the run stops. abstain: it is called
    again for each completion alone, and one that misses the deadline again gets no reward, from no function; it
    counts in frac_rows_late."""
    on_reward_error: Literal["stop", "abstain"] = "stop"
    """What follows on a reward function that raises an error. stop: the run stops. abstain: it is called again
    for each completion alone, and gives no reward to those for which it raises an error again."""
    on_abstain: Literal["zero", "leave-out"] = "zero"
    """What follows where one of several weighted rewards gives a completion no reward. zero: it counts as 0 in
    their sum. leave-out: the completion is left out of its group, as where none of them gives a reward."""
    environment: Annotated[str, OR_OBJECT, NamesCode()] | None = None
    """Environment that answers to each turn of a completion, so that a row is an episode of several turns:
    `module:Env` or `file.py:Env`, a class or function that takes no arguments, or a dict of them by the
    value of each row's column environment. It has gymnasium's reset and step on text, or reset and methods
    that are tools, as in TRL. Each row of the task begins an episode; without a task the prompts are empty.
    Default: that of the task, if it has one."""
    max_turns: Count = 10
    """Turns of the policy after which an episode ends."""
    share_seed: bool = True
    """Give the episodes of a prompt's group the same seed for reset, so that they differ by what the policy
    does alone."""
    malformed: Literal["end", "observe"] = "end"
    """What follows on a call of a tool that cannot be parsed: end ends the episode, observe lets the policy
    read the error and write on."""
    prompt_column: str = "prompt"
    """Column of a dataset that holds the prompt, which is text or chat messages. Data without a column
    prompt may have messages, whole conversations: a last turn of the assistant is the answer, and no part of
    the prompt."""
    prompt_template: str | None = None
    """Template that makes the prompt from columns, such as '{question} Answer:'; replaces prompt_column. Dots
    lead into nested columns, as in '{robot.pose.x}'; lists and objects are written as JSON. In a shell write
    $'{question}\\nAnswer:' for a line break."""
    split: str = "train"
    """Split of a dataset to train on."""
    eval_split: str | None = None
    """Split to evaluate on, which is taken as it is, also where prompts are in the training split too.
    Default: a validation or test split if there is one, else about a fifth of the prompts of the training
    split, and at most 2,000 rows. A hash of the prompt holds it out, so every command takes the same ones, for
    any seed, size and order. Where a few prompts have most rows, single rows are held out."""
    eval_size: Count | None = None
    """Most rows to evaluate on, of those held out; nothing is trained on instead. Default: 128 of a dataset
    or of reasoning-gym, else all that the task holds out."""


@dataclass(frozen=True)
class TaskArguments(DataArguments, measured=True):
    """Where prompts and rewards come from."""

    task: Task = LEFT_OUT
    """Name of a toy task, `module:attribute` (a task or an environment), a JSON, CSV, TSV or Parquet file, also
    compressed, a folder or hub name that `datasets` reads, or `reasoning_gym:NAME(size=500, seed=0)`. From
    Python also a datasets.Dataset, a DatasetDict, a pandas DataFrame, a list of rows or a task object. An
    environment that is named without a task is the task."""
    reward: RewardNames = ()
    """`module:function`, `file.py:function`, a directory with a sequence classifier of one label, or a reward
    of the library: exact_match, numeric_answer, 'regex_format(pattern="...")', 'length(target=20)'.
    Several rewards are summed, with that of an environment too. none: training gets no reward, also from an
    environment, and learns from a teacher alone; the task's own reward is evaluated all the same, if there is
    one. Default: the task's own reward."""

    def __post_init__(self) -> None:
        """Check the values; an environment that is named without a task is the task."""
        super().__post_init__()
        if self.environment is not None and (self.task is None or isinstance(self.task, LeftOut)):
            object.__setattr__(self, "task", self.environment)


def read_splits(name: str) -> dict[str, Rows]:
    """Read all splits of a data file, a folder, or a hub dataset.

    Args:
        name: path of a JSON, CSV or Parquet file, also compressed, or of a folder, or `owner/name[:config]` on
            the hub.

    Returns:
        The rows of each split, by the name of the split. A single file is the split "train".

    Raises:
        Refused: nothing is there, it cannot be read, or the hub cannot be reached; the message says why.
    """
    if name.startswith(IN_MEMORY):
        raise Refused(
            f"'{name}' was data given from Python: give it again, or save it once with "
            "dataset.to_parquet('data.parquet') and name that file."
        )
    path = Path(name)
    is_file = path.is_file()
    ending = format_of(path)
    if ending in FORMATS and not path.exists():
        raise Refused(f"task '{name}': there is no such file. Give its path from {Path.cwd()}.")
    if is_file and ending not in FORMATS:
        raise Refused(
            f"task '{name}': cannot read '{ending}' files; allowed are {', '.join(FORMATS)}, also with "
            f"{', '.join(COMPRESSED)} behind it. Put an archive such as .zip into a folder, and give the folder. "
            "Read a database or a spreadsheet with pandas, such as frame = pandas.read_sql('select * from TABLE', "
            "sqlite3.connect(FILE)); then give task=frame, or frame.to_parquet('rows.parquet') and that file."
        )
    remedy = FORMAT_HINT if path.exists() else CACHE_HINT
    with refusing(f"task '{name}': the data could not be read", remedy):
        if is_file and ending != ".parquet":
            separator = "\t" if ending == ".tsv" else ","
            splits = read_rows({"train": [path]}, FORMATS[ending], separator)
        else:
            splits = _by_datasets(path, name)
    if is_file and not splits["train"]:
        raise Refused(f"The file '{name}' is empty: give data with at least one row.")
    return splits


def _by_datasets(path: Path, name: str) -> dict[str, Rows]:
    """Read what `datasets` finds: a Parquet file, a folder or a hub dataset.

    Where these are JSON or CSV files without types that their author declared, it only names them.
    """
    import datasets

    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return memory_splits(datasets.load_from_disk(name))
    # What lies here is read anew each time. The cache tells files by name and time, and could give the rows of
    # an earlier file in silence, or those of a damaged copy.
    with without_progress_bars(), tempfile.TemporaryDirectory() as folder:
        load: Any = datasets.load_dataset_builder
        if path.is_file():
            load = partial(load, "parquet", data_files=name, cache_dir=folder)
        elif path.exists():
            load = partial(load, name, cache_dir=folder)
        else:
            hub_name, _, config = name.partition(":")
            load = partial(load, hub_name, config or None)
        builder = load()
        is_typed = builder.info.features is not None
        if is_typed and builder.name == "csv":  # NA is a text like others
            builder = load(keep_default_na=False, na_values=[""])
        if is_typed or builder.name not in ("json", "csv"):
            builder.download_and_prepare()
            return memory_splits(builder.as_dataset())
        cache = folder if path.exists() else None
        options = datasets.DownloadConfig(cache_dir=cache)
        manager = datasets.DownloadManager(download_config=options)
        splits = {
            str(split): [*map(Path, manager.iter_files(paths))]
            for split, paths in manager.download_and_extract(builder.config.data_files).items()
        }
        return read_rows(splits, builder.name, getattr(builder.config, "sep", ","))


def with_prompts(rows: Rows, source: str, data: DataArguments, *, chat: bool = False) -> Rows:
    """Add a checked "prompt" to each row: the value of a column, or a template filled from the columns.

    Of conversations in a column `messages`, which stands in for a missing `prompt`, a last turn of the assistant
    is left out: it becomes the columns `answer` (text, for rewards) and `completion`, if the row has none.

    Args:
        rows: the rows as they were read.
        source: what error messages call the rows.
        data: `prompt_column` holds the prompt, unless there is a `prompt_template`.
        chat: make each prompt that is text a message of the user.

    Raises:
        Refused: no rows, no such column, a template that cannot be filled, or a prompt of another kind.
    """
    if not rows:
        raise Refused(
            f'{source} is empty: give at least one row, such as {{"prompt": "1+1=", "answer": 2}}.'
        )
    column = data.prompt_column
    fillings: list[str] = []
    if column == "prompt" and column not in rows.columns and "messages" in rows.columns:
        column = "messages"
    if data.prompt_template is not None:
        template = data.prompt_template
        subject = f"{source}, prompt_template {template!r}: the prompt of"
        pairs = [filled(template, row, f"{subject} {place}") for place, row in with_places(rows)]
        prompts: list[Any] = [prompt for prompt, _ in pairs]
        fillings = [question_of(" ".join(sorted(used))) for _, used in pairs]
    elif column not in rows.columns:
        raise Refused(
            f"{source} has no column '{column}'.{suggest(column, rows.columns)} Name it by prompt_column, or give "
            "a prompt_template (--prompt-template). In CSV the first line names the columns."
        )
    elif column == "messages":
        rows = Rows.of(_from_conversations(rows, source))
        prompts = rows.columns["prompt"]
    else:
        prompts = list(map(as_prompt, rows.columns[column]))
    for number, (location, prompt) in enumerate(zip(rows.locations, prompts, strict=True)):
        if fault := fault_of_prompt(prompt):
            raise Refused(
                f"{source}, {location}: {fault}. A prompt is text, or a list of chat messages "
                '{"role": ..., "content": text}.'
            )
        if chat and isinstance(prompt, str):
            prompts[number] = [{"role": "user", "content": prompt}]
    return Rows({**rows.columns, "prompt": prompts}, rows.locations, fillings or rows.fillings)


def as_prompt(value: Any) -> Any:
    """Return a value of a column that holds texts or chat messages as one of the two.

    A number is the text that Python writes, as in a column of CSV. Messages lose their keys that are None, as
    Arrow gives every message the keys of all messages. The content of a message that calls tools, thinks, or
    holds the result of a tool may be null, and is then empty text.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, list) or not all(isinstance(message, Mapping) for message in value):
        return value
    messages = []
    for message in value:
        present = {key: part for key, part in message.items() if part is not None}
        if present.keys() & WRITTEN or present.get("role") == "tool":
            present.setdefault("content", "")
        messages.append(present)
    return messages


def _from_conversations(rows: Rows, source: str) -> Iterator[Placed]:
    """Yield rows whose prompt is the conversation before the assistant's last turn, if it ends with one."""
    with_answer: dict[bool, str] = {}
    for location, row in with_places(rows):
        turns = as_prompt(row["messages"])
        fault = "it is text" if isinstance(turns, str) else fault_of_prompt(turns)
        if fault:
            raise Refused(
                f"{source}, {location}: of the column 'messages', {fault}; it holds chat messages."
            )
        columns = {}
        is_answered = turns[-1]["role"] == "assistant"
        if is_answered:
            *turns, last = turns
            columns = {"answer": last["content"]}
            columns["completion"] = [last] if len(last) > 2 else last["content"]
        with_answer.setdefault(is_answered, location)
        yield Placed({**columns, **row, "prompt": turns}, location)
    if len(with_answer) > 1:
        raise Refused(
            f"{source}: the messages of {with_answer[True]} end with a turn of the assistant, and those of "
            f"{with_answer[False]} do not: give every conversation an answer, or none."
        )


def fault_of_prompt(prompt: Any, name: str = "prompt") -> str:
    """Say why a value is neither text nor a list of chat messages; nothing if it is one of the two.

    Text with half of a surrogate pair, as bytes that are no UTF-8 become, is none that a tokenizer takes.
    """
    if isinstance(prompt, str):
        half = HALF_OF_PAIR.search(prompt)
        return f"the {name} holds {half[0]!r}, which UTF-8 cannot write" if half else ""
    if not isinstance(prompt, list | tuple):
        return f"the {name} is {shown(prompt, 100)} ({type(prompt).__name__})"
    if not prompt:
        return f"the {name} is an empty list"
    for number, message in enumerate(as_prompt(prompt)):
        subject = f"message {number} of the {name}"
        if not isinstance(message, Mapping):
            return f"{subject} is {message!r:.100} ({type(message).__name__})"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) or HALF_OF_PAIR.search(message[key]):
                return f"{subject} has {key} {message.get(key)!r:.100}"
    return ""
