"""Defines the arguments of `tokenrl sft`, which are also the keywords of the function; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from tokenrl.language.policy.arguments import LoraArguments, ModelArguments
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.runs.checkpoint import SavingArguments
from tokenrl.runs.metrics import TrackerArguments
from tokenrl.runs.threads import ThreadArguments
from tokenrl.settings import (
    OPEN,
    Count,
    Natural,
    Positive,
    Seed,
)


@dataclass(frozen=True)
class SftArguments(
    ModelArguments, TaskArguments, LoraArguments, SavingArguments, TrackerArguments, ThreadArguments
):
    """Fine-tune a model on demonstrations: rows with a prompt and a completion."""

    output_dir: str | None = None
    """Directory of the run, for its config, metrics, model and report. Default: a new one, runs/sft-1,
    runs/sft-2 and so on; with resume the newest of these."""
    completion_column: str = "completion"
    """Column of a data set that holds the completions."""
    max_steps: Count = OPEN
    """Updates. Default: 200. A toy task with another model than its own: 250."""
    batch_size: Count = OPEN
    """Demonstrations per update. Default: 64. A toy task with another model than its own: 16."""
    learning_rate: Positive = OPEN
    """Peak learning rate, falling linearly to 0. Default: by the model's size, such as 1e-4 for 135 M
    parameters, and 2e-5 from 1 B on; ten times that with LoRA, at most 1e-3."""
    eval_every: Natural = OPEN
    """Updates between evaluations on 64 held-out prompts (or eval_size of them), greedy and sampled, where
    there is a reward; 0: only before and after training. Default: a tenth of the run."""
    seed: Seed = 0
    """Seed of the order of demonstrations."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    quiet: bool = False
    """Print nothing but errors."""
