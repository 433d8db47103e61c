"""Defines the arguments of `tokenrl sft`, and those that other trainings share with it; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenrl.language.policy.arguments import LoraArguments, ModelArguments
from tokenrl.language.rollout.distribution import Rule
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.runs.checkpoint import SavingArguments
from tokenrl.runs.metrics import TrackerArguments
from tokenrl.runs.threads import ThreadArguments
from tokenrl.settings import (
    OPEN,
    Count,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Settings,
)

RECOMMENDED = "recommended by the task"
"""Origin of a setting, in words."""


@dataclass(frozen=True)
class PassArguments(Settings, group="optimiser"):
    """How much a pass through the model takes at once, and in which precision."""

    micro_batch_size: Count | None = None
    """The most completions, demonstrations or pairs in one forward pass of one process, within
    tokens_per_pass; changes memory only, not the update. Default: any number."""
    tokens_per_pass: Count = OPEN
    """Tokens in one forward pass of one process, those of prompts included; changes memory only.
    Default: as many as have activations of about 4 GiB, at 34 numbers for each layer and hidden unit."""
    pass_overhead: Count = OPEN
    """Tokens that take as long to compute as a pass takes to start. Rows are divided into passes by length
    where that leaves out more padding; changes time only, not the update. Default: 250,000 over the square
    root of the number of parameters on a CPU, 1,000 times as many on other devices."""
    mixed_precision: Literal["no", "bf16"] = OPEN
    """bf16: compute with a bfloat16 copy of the weights, which stay float32; tokenrl train samples with it
    too. Default: bf16 on a GPU that has it, and from 10 M parameters on also on a CPU that multiplies in it
    (AVX512_BF16, AMX); else no."""


@dataclass(frozen=True)
class DescentArguments(PassArguments, group="optimiser"):
    """How weights are updated by AdamW on rows of data."""

    max_steps: Count = OPEN
    """Updates."""
    batch_size: Count = OPEN
    """Rows per update."""
    learning_rate: Positive = OPEN
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "linear"
    """Schedule of the learning rate after the warm-up; linear and cosine fall to 0."""
    warmup_steps: Natural = 0
    """Updates over which the learning rate rises from 0 to its peak."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NonNegative = 1.0
    """Gradients with a larger norm are scaled down to this norm; 0: never."""
    seed: Seed = 0
    """Seed of the order of the rows."""


@dataclass(frozen=True)
class SftArguments(
    ModelArguments,
    TaskArguments,
    LoraArguments,
    DescentArguments,
    SavingArguments,
    TrackerArguments,
    ThreadArguments,
):
    """Fine-tune a model on demonstrations: rows with a prompt and a completion."""

    output_dir: str | None = None
    """Directory of the run, for its config, metrics, model and report. Default: a new one, runs/sft-1,
    runs/sft-2 and so on; with resume the newest of these."""
    completion_column: str = "completion"
    """Column of a data set that holds the completions."""
    allowed: Rule = ""
    """Refuse demonstrations that this rule does not allow, as in tokenrl train, and evaluate completions that it
    does. The loss is that of the model without the rule."""
    max_steps: Count = OPEN
    """Updates. Default: 200. A toy task with another model than its own: 250."""
    batch_size: Count = OPEN
    """Demonstrations per update. Default: 64. A toy task with another model than its own: 16."""
    learning_rate: Positive = OPEN
    """Peak learning rate. Default: by the model's size, such as 1e-4 for 135 M parameters, and 2e-5 from 1 B
    on; ten times that with LoRA, at most 1e-3."""
    training_attention: Literal["as_loaded", "eager"] = OPEN
    """Attention of updates: as the model was loaded (mostly sdpa), or by its plain formula. Default: eager on
    a CPU from 10 M parameters on, with completions of at most 128 tokens; else as loaded."""
    eval_every: Natural = OPEN
    """Updates between evaluations on 64 held-out prompts (or eval_size of them), greedy and sampled, where
    there is a reward; 0: only before and after training. Default: a tenth of the run."""
    cpu: bool | None = None
    """Use the CPU even if there is a GPU. Default: as in tokenrl train."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    quiet: bool = False
    """Print nothing but errors."""
