"""Reads data files, folders and hub datasets, and makes checked prompts of their rows, as arguments say how.

Everything here runs before the first step, so whatever goes wrong is `Refused`. A traceback from a network
library tells a user neither what was asked for nor how to mend it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import string
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tokenrl.errors import Placed, Refused, describe, suggest, with_places
from tokenrl.runs.output import without_progress_bars
from tokenrl.settings import OR_OBJECT, Bounds, Count, Number, Settings

Row = Mapping[str, Any]

FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
HALF_OF_PAIR = re.compile("[\ud800-\udfff]")
BEFORE_JSON = b"\xef\xbb\xbf \t\r\n"  # what may stand before a value: a mark of UTF-8, and space


@dataclass(frozen=True)
class DataArguments(Settings, group="data"):
    """How prompts are read, and how rewards are weighted and called."""

    reward_weights: tuple[Number, ...] = ()
    """One weight per reward. Default: 1 for each."""
    reward_timeout: Annotated[float, Bounds(above=0, at_most=1e6)] | None = None
    """Seconds that one call of a reward function may take. The functions then run in a process of their own,
    which is killed at the deadline, and the run stops. Reward models are exempt. It also bounds one call of
    an environment, whose episode then ends as timeout, and the run goes on. Default: no deadline."""
    environment: Annotated[str, OR_OBJECT] | None = None
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
    """Template that makes the prompt from columns, such as '{question}\\nAnswer:'; replaces prompt_column."""
    split: str = "train"
    """Split of a dataset to train on."""
    eval_split: str | None = None
    """Split to evaluate on. Default: a validation or test split if there is one, else rows held out of the
    training split."""
    eval_size: Count | None = None
    """Most prompts to evaluate on. Default: 128 of a dataset or of reasoning-gym, but of a dataset without a
    split for it at most a fifth of the prompts; else all that the task holds out."""


@dataclass(frozen=True)
class TaskArguments(DataArguments):
    """Where prompts and rewards come from."""

    task: Annotated[str, OR_OBJECT] = "sort_digits"
    """Name of a toy task, `module:attribute` (a task or an environment), a JSON, CSV or Parquet file, a
    folder or hub name that `datasets` reads, or `reasoning_gym:NAME(size=500, seed=0)`. From Python also a
    datasets.Dataset, a DatasetDict, a list of rows or a task object."""
    reward: Annotated[tuple[str, ...], OR_OBJECT] = ()
    """`module:function`, `file.py:function`, a directory with a sequence classifier of one label, or a reward
    of the library: exact_match, numeric_answer, 'regex_format(pattern="...")', 'length(target=20)'.
    Several rewards are summed, with that of an environment too. Default: the task's own reward."""

    def __post_init__(self) -> None:
        """Check the values; an environment that is named without a task is the task."""
        super().__post_init__()
        if self.environment is not None and self.task in (None, TaskArguments.task):
            object.__setattr__(self, "task", self.environment)


def read_splits(name: str) -> dict[str, list[dict[str, Any]]]:
    """Read all splits of a data file, a folder, or a hub dataset.

    Args:
        name: path of a JSON, CSV or Parquet file, path of a folder, or `owner/name` or `owner/name:config` on
            the hub.

    Returns:
        The rows of each split, by the name of the split. A single file is the split "train".

    Raises:
        Refused: nothing is there, it cannot be read, or the hub cannot be reached; the message says why.
    """
    path = Path(name)
    is_file = path.is_file()
    if not path.exists() and path.suffix in FORMATS:
        raise Refused(f"task '{name}': there is no such file. Give its path from {Path.cwd()}.")
    if is_file and path.suffix not in FORMATS:
        raise Refused(f"task '{name}': cannot read '{path.suffix}' files; allowed are {', '.join(FORMATS)}.")
    if is_file and path.stat().st_size < 64 and not path.read_bytes().strip(b"[] \t\r\n"):
        raise Refused(f"The file '{name}' is empty: give data with at least one row.")
    import datasets

    try:
        # A file is read anew each time: a damaged copy of it in the cache could give other rows in silence.
        with without_progress_bars(), tempfile.TemporaryDirectory() as aside:
            for file in [path] if is_file else sorted(path.rglob("*")):
                _check_lines(file)
            if is_file:
                data = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), cache_dir=aside)
            elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
                data = datasets.load_from_disk(os.fspath(path))
            else:
                hub_name, _, config = (name, "", "") if path.exists() else name.partition(":")
                data = datasets.load_dataset(hub_name, config or None)
            splits = data if isinstance(data, dict) else {"train": data}
            tables = {split: rows.to_list() for split, rows in splits.items()}
            return {"train": _at_lines(tables["train"], path)} if is_file else tables
    except Exception as error:  # each backend (arrow, pandas, hub, http) has its own errors
        raise Refused(
            f"task '{name}': the data could not be read ({describe(error)})."
            + f" The hub needs a network or a copy in {datasets.config.HF_DATASETS_CACHE}, which must be "
            "writable; if it is damaged, delete it." * (not is_file)
        ) from error


def _check_lines(file: Path) -> None:
    """Check that no row of a JSON file is null, and that JSON and CSV are UTF-8.

    pyarrow (26.0) ends the process by a segmentation fault where a block of lines begins with a null.

    Raises:
        ValueError: they are not; the message names the line, or the item of a list.
    """
    kind = FORMATS.get(file.suffix)
    if kind not in ("json", "csv") or not file.is_file():
        return
    with file.open("rb") as lines:
        is_list = kind == "json" and lines.read(64).lstrip(BEFORE_JSON).startswith(b"[")
        lines.seek(0)
        for number, row in enumerate(json.load(lines) if is_list else lines, start=1):
            position = f"{'item' if is_list else 'line'} {number} of {file}"
            try:
                line = json.dumps(row, ensure_ascii=False).encode() if is_list else row
                line.decode()
            except UnicodeError as error:
                raise ValueError(f"{position} is no UTF-8") from error
            if kind == "json" and line.lstrip(BEFORE_JSON).startswith(b"null"):
                raise ValueError(f"{position} is null: a row is an object; remove the null")


def _at_lines(rows: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Give each row the line of the file that holds it as its place, unless some take more than a line."""
    if file.suffix == ".parquet":
        return rows
    numbers = [n for n, line in enumerate(file.read_bytes().split(b"\n"), 1) if line.strip()]
    numbers = numbers[1:] if file.suffix == ".csv" else numbers  # without the names of the columns
    if len(numbers) != len(rows):
        return rows
    return [Placed(row, f"line {number}") for row, number in zip(rows, numbers, strict=True)]


def with_prompts(
    rows: Sequence[Row], where: str, data: DataArguments, *, chat: bool = False
) -> list[dict[str, Any]]:
    """Add a checked "prompt" to each row: the value of a column, or a template filled from the columns.

    Of a column `messages`, which holds whole conversations, a last turn of the assistant is the answer: it
    leaves the prompt, and its text becomes the columns `answer` (for rewards) and `completion` (for `sft`)
    unless the row has them. Without a column `prompt`, the column `messages` is used.

    Args:
        rows: the rows as they were read; every row has the same columns.
        where: what error messages call the rows.
        data: `prompt_column` holds the prompt, unless there is a `prompt_template`.
        chat: make each prompt that is text a message of the user.

    Raises:
        Refused: there are no rows or no such column, the template cannot be filled, or a prompt is neither
            text nor chat messages.
    """
    if not rows:
        raise Refused(f'{where} is empty: give at least one row, such as {{"prompt": "1+1=", "answer": 2}}.')
    columns, column = list(rows[0]), data.prompt_column
    if column == "prompt" and column not in columns and "messages" in columns:
        column = "messages"
    if data.prompt_template is not None:
        prompted = _filled(data.prompt_template, rows, where)
    elif column == "messages" and column in columns:
        prompted = _from_conversations(rows, where)
    elif column in columns:
        prompted = [{**row, "prompt": without_nulls(row[column])} for row in rows]
    else:
        problem = f"{where} has no column '{column}'.{suggest(column, columns)}"
        raise Refused(f"{problem} Name it by prompt_column, or give a prompt_template (--prompt-template).")
    prompted = [Placed(row, position) for (position, _), row in zip(with_places(rows), prompted, strict=True)]
    check_prompts(prompted, where)
    for row in prompted:
        if chat and isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}]
    return prompted


def _filled(template: str, rows: Sequence[Row], where: str) -> list[dict[str, Any]]:
    """Return the rows with prompts made by a template from their columns."""
    try:
        parsed = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
        fields = [field.replace("[", ".").split(".")[0] for field in parsed]
        unknown = [field for field in fields or [""] if field not in rows[0]]
        if unknown:
            raise Refused(f"no column is named {unknown[0]!r}.{suggest(unknown[0], rows[0])}")
        filled = []
        for position, row in with_places(rows):
            empty = [field for field in fields if row[field] is None or row[field] != row[field]]
            if empty:  # the word None or nan would enter the prompt
                raise Refused(f"column '{empty[0]}' of {position} is {row[empty[0]]!r}.")
            filled.append({**row, "prompt": template.format(**row)})
    except Exception as error:
        problem = str(error) if isinstance(error, Refused) else f"{describe(error)}. Write {{{{ for a brace."
        raise Refused(f"{where}, prompt_template {template!r}: {problem}") from error
    return filled


def without_nulls(prompt: Any) -> Any:
    """Drop keys that are None from chat messages.

    Arrow gives every message the keys of all messages, with None where it had none, and a chat template would
    take these keys as given.
    """
    if not isinstance(prompt, list) or not all(isinstance(message, Mapping) for message in prompt):
        return prompt
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def _from_conversations(rows: Sequence[Row], where: str) -> list[dict[str, Any]]:
    """Rows whose prompt is the conversation before the assistant's last turn, if it ends with one."""
    prompted, first = [], dict[bool, str]()
    for position, row in with_places(rows):
        messages = without_nulls(row["messages"])
        fault = "it is text" if isinstance(messages, str) else fault_of_prompt(messages)
        if fault:
            raise Refused(f"{where}, {position}: of the column 'messages', {fault}; it holds chat messages.")
        answered = messages[-1]["role"] == "assistant"
        first.setdefault(answered, position)
        text, turns = messages[-1]["content"], messages[:-1] if answered else messages
        answer = {"answer": text, "completion": text} if answered else {}
        prompted.append({**answer, **row, "prompt": turns})
    if len(first) > 1:
        raise Refused(
            f"{where}: the messages of {first[True]} end with a turn of the assistant, and "
            f"those of {first[False]} do not: give every conversation an answer, or none."
        )
    return prompted


def check_prompts(rows: Iterable[Row], where: str) -> None:
    """Check that every row's "prompt" is text (also empty text) or a list of chat messages.

    Raises:
        Refused: a row has another prompt, or none; the message names the row and what was found there.
    """
    for position, row in with_places(rows):
        if not isinstance(row, Mapping) or "prompt" not in row:
            raise Refused(f"{where}, {position}: expected a mapping with a 'prompt', found {row!r:.200}.")
        fault = fault_of_prompt(row["prompt"])
        if fault:
            allowed = 'text, or a list of chat messages {"role": ..., "content": text}'
            raise Refused(f"{where}, {position}: {fault}. A prompt is {allowed}.")


def fault_of_prompt(prompt: Any, name: str = "prompt") -> str:
    """Say why a value is neither text nor a list of chat messages; nothing if it is one of the two.

    Text with half of a surrogate pair, as bytes that are no UTF-8 become, is none that a tokenizer takes.
    """
    if isinstance(prompt, str):
        half = HALF_OF_PAIR.search(prompt)
        return f"the {name} holds {half[0]!r}, which UTF-8 cannot write" if half else ""
    if not isinstance(prompt, list | tuple) or not prompt:
        empty = "an empty list" if prompt == [] else f"{prompt!r:.100} ({type(prompt).__name__})"
        return f"the {name} is {empty}"
    for position, message in enumerate(prompt):
        if not isinstance(message, Mapping):
            return f"message {position} of the {name} is {message!r:.100} ({type(message).__name__})"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str) or HALF_OF_PAIR.search(message[key]):
                return f"message {position} of the {name} has {key} {message.get(key)!r:.100}"
    return ""


IN_MEMORY = "in-memory:"
"""How the names of such tasks begin; a fingerprint of the rows follows. No module can have this name."""

FORMS = (
    "a name, a task object, a datasets.Dataset (from_pandas, from_dict, from_list; of a stream "
    'from_list(list(data.take(N)))), a list of rows, such as [{"prompt": ...}], or a dict of splits of these'
)


def memory_splits(data: Any) -> dict[str, list[dict[str, Any]]]:
    """Copy all splits of data that was given from Python.

    Args:
        data: a `datasets.Dataset`, a list of rows, or a mapping of splits to one of these.

    Returns:
        The rows of each split, by the name of the split. Data without splits is the split "train".

    Raises:
        Refused: the data is streamed or of another type, a row is no mapping, or rows have different columns.
    """
    if isinstance(data, Mapping) and "prompt" in data:
        problem = "task is a dict with the key 'prompt', and the keys of a dict are names of splits"
        raise Refused(f"{problem}: write task=[row] for a row, Dataset.from_dict(columns) for columns.")
    if isinstance(data, Mapping):
        return {str(name): _rows(value, f"task, split '{name}'") for name, value in data.items()}
    return {"train": _rows(data, "task")}


def _rows(data: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(data, list | tuple):
        import datasets

        if isinstance(data, datasets.Dataset):
            # A function that with_transform applies to rows is applied where they are read one by one.
            custom = data.format["type"] == "custom"
            return [dict(row) for row in data] if custom else data.to_list()  # type: ignore[return-value]
        description = " ".join(repr(data).split())
        raise Refused(f"{where} is {description:.100} ({type(data).__name__}); it must be {FORMS}.")
    for index, row in enumerate(data):
        if not isinstance(row, Mapping):
            description = f"{where}, row {index} is {row!r:.100} ({type(row).__name__}); a row is a dict"
            raise Refused(f'{description}. Of texts write task=[{{"prompt": text}} for text in texts].')
        if row.keys() != data[0].keys():
            differ = ", ".join(sorted(map(str, row.keys() ^ data[0].keys())))
            rows = f"row {index} and row 0 do not have the same columns; only one has {differ}"
            raise Refused(f"{where}: {rows}. Give None where there is no value.")
    return [dict(row) for row in data]


def fingerprint(splits: Mapping[str, Sequence[Row]]) -> str:
    """Return 12 hexadecimal digits that equal rows in equal splits share, whatever object held them."""
    digest = hashlib.sha256()
    for name, rows in splits.items():
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:12]


def described(splits: Mapping[str, Sequence[Row]]) -> tuple[str, dict[str, Any]]:
    """Return the name of data that was given from Python, and what is recorded of it."""
    columns = dict.fromkeys(name for rows in splits.values() for row in rows for name in row)
    rows = {name: len(rows) for name, rows in splits.items()}
    origin: dict[str, Any] = {"rows": rows, "columns": list(columns), "fingerprint": fingerprint(splits)}
    return IN_MEMORY + origin["fingerprint"], origin


def recorded(task: Any) -> dict[str, Any]:
    """Return what config.json says besides the name of a task.

    Args:
        task: the task, or None. Data that was given from Python is described as `task_rows`; `chat_prompts`
            says that prompts are chat messages.
    """
    origin, rows = getattr(task, "origin", None), getattr(task, "train_prompts", ())
    chats = any(not isinstance(row["prompt"], str) for row in rows)
    return ({"task_rows": origin} if origin else {}) | ({"chat_prompts": True} if chats else {})
