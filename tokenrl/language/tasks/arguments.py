"""Arguments that say where prompts and rewards come from. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from tokenrl.settings import Count, Positive, Settings


@dataclass(frozen=True)
class DataArguments(Settings, group="data"):
    """How prompts are read, and how rewards are weighed and called."""

    reward_weights: tuple[float, ...] = ()
    """One weight a reward. Default: 1 each."""
    reward_timeout: Positive | None = None
    """Seconds that one call of a reward function may take; the functions then run in a process of their own,
    which is killed at the deadline, and the run stops. A reward model stays here. Default: no deadline."""
    prompt_column: str = "prompt"
    """Column of a data set that holds the prompt, text or chat messages."""
    prompt_template: str | None = None
    """Prompt made from columns, as '{question}\\nAnswer:'; takes the place of prompt_column."""
    split: str = "train"
    """Split of a data set to train on."""
    eval_split: str | None = None
    """Split to evaluate on. Default: rows held out of the training split."""
    eval_size: Count = 128
    """Rows held out of a data set that has no evaluation split."""


@dataclass(frozen=True)
class TaskArguments(DataArguments):
    """Where prompts and rewards come from."""

    task: str = "sort_digits"
    """A toy task's name, `module:attribute`, a JSON/CSV/Parquet file, a `datasets` name, or
    `reasoning_gym:NAME(size=500, seed=0)`."""
    reward: tuple[str, ...] = ()
    """`module:function`, `file.py:function`, a directory with a one-label sequence classifier, or one of the
    library: exact_match, numeric_answer, 'regex_format(pattern="...")', 'length(target=20)', repetition,
    valid_json, sentiment, 'product(a, b)', 'gate(condition, reward, threshold=1)'; several are summed.
    Default: the task's own."""
