"""Arguments that say where prompts and rewards come from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tokenrl.settings import OR_OBJECT, Bounds, Count, Number, Settings


@dataclass(frozen=True)
class DataArguments(Settings, group="data"):
    """How prompts are read, and how rewards are weighted and called."""

    reward_weights: tuple[Number, ...] = ()
    """One weight per reward. Default: 1 for each."""
    reward_timeout: Annotated[float, Bounds(above=0, at_most=1e6)] | None = None
    """Seconds that one call of a reward function may take. The functions then run in a process of their own,
    which is killed at the deadline, and the run stops. Reward models are exempt. Default: no deadline."""
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
    """Most prompts to evaluate on. Default: 128 of a dataset or of reasoning-gym, else all that the task
    holds out."""


@dataclass(frozen=True)
class TaskArguments(DataArguments):
    """Where prompts and rewards come from."""

    task: Annotated[str, OR_OBJECT] = "sort_digits"
    """Name of a toy task, `module:attribute`, a JSON, CSV or Parquet file, a folder or hub name that
    `datasets` reads, or `reasoning_gym:NAME(size=500, seed=0)`. From Python also a datasets.Dataset, a
    DatasetDict, a list of rows or a task object."""
    reward: Annotated[tuple[str, ...], OR_OBJECT] = ()
    """`module:function`, `file.py:function`, a directory with a sequence classifier of one label, or a reward
    of the library: exact_match, numeric_answer, 'regex_format(pattern="...")', 'length(target=20)',
    repetition, valid_json, sentiment. Several
    rewards are summed. Default: the task's own reward."""
