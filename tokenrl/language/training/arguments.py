"""Arguments of the language side's commands, each also a keyword of the Python function. Imports no torch.

`None` means: what the task recommends, else the default named in the field's text. A run works on
`TrainSettings` or `SftSettings`, in which every such `None` has been replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tokenrl.core.estimator import Estimator
from tokenrl.language.policy.arguments import LoraArguments, ModelArguments
from tokenrl.language.tasks.arguments import TaskArguments
from tokenrl.settings import Bounds, Count, Natural, NonNegative, Positive, Settings


@dataclass(frozen=True)
class SamplingArguments(Settings, group="sampling"):
    """What training samples, and from which prompts."""

    temperature: Positive = 1.0
    """Temperature of the policy that is sampled and scored."""
    truncate_prompts: bool = False
    """Drop tokens from the left of prompts too long for the context, instead of refusing them."""
    filter_difficulty: tuple[float, float] | None = None
    """Train only on prompts whose mean reward, measured before training, lies from LOW to HIGH (for rewards
    of 0 and 1: the success rate). This changes the distribution of prompts, so the objective, and not the
    gradient of a prompt. Default: all prompts."""
    filter_samples: Count = 8
    """Completions a prompt by which that is measured."""
    max_refills: Natural = 4
    """Rounds in which new prompts replace groups of equal rewards, with zero_spread refill (dapo)."""


@dataclass(frozen=True)
class OptimiserArguments(Settings, group="optimiser"):
    """How a rollout changes the weights."""

    lr_scheduler_type: Literal["constant", "linear", "cosine"] | None = None
    """Learning rate after the warm-up; linear and cosine fall to 0. Default: constant."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises from 0."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NonNegative = 1.0
    """Largest gradient norm; 0 clips nothing."""
    num_iterations: Count = 1
    """Passes over each rollout."""
    num_minibatches: Count = 1
    """Updates a pass, each on a share of the prompts."""
    micro_batch_size: Count | None = None
    """Completions in one forward pass of one process; changes memory, not the update. Default: all."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Autocast precision of forward passes, float32 weights kept."""
    value_learning_rate: Positive = 1e-3
    """Learning rate of the critic, for estimators that have one (a2c, ppo)."""
    value_iterations: Natural = 4
    """Updates of the critic a step."""


@dataclass(frozen=True)
class KlArguments(Settings, group="KL control"):
    """Holding the KL to the reference policy near a target."""

    target_kl: Positive | None = None
    """KL to the reference to hold, in nats a completion: --estimator.beta is then the weight that the run
    starts from, and follows the KL (Ziegler et al. 2019). Default: the weight stays as it is."""
    kl_gain: Annotated[float, Bounds(above=0, below=5)] = 0.1
    """How fast that weight follows: a step changes it by at most a fifth of this."""


@dataclass(frozen=True)
class EvaluationArguments(Settings, group="evaluation"):
    """What is measured beside the training."""

    eval_every: Natural | None = None
    """Steps between evaluations on held-out prompts. Default: a tenth of the run; 0: only before and
    after."""
    eval_generations: Natural = 4
    """Sampled completions a held-out prompt, beside the greedy one."""
    diagnostics_every: Natural = 0
    """Steps between measurements of the gradient's signal and noise; 0: none."""


@dataclass(frozen=True)
class RecordArguments(Settings, group="checkpoints and logs"):
    """What a run keeps and shows."""

    save_every: Natural = 0
    """Steps between checkpoints; 0: none but the final model."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    logging_steps: Count = 1
    """Steps between lines on a screen that is no terminal, and between tracker records."""
    log_completions: Natural | None = None
    """Steps between tables of sampled completions, on screen and in completions/. Default: with each
    evaluation."""
    report_to: tuple[str, ...] = ()
    """Trackers, through accelerate: tensorboard and others it knows."""
    resume: str | None = None
    """Not built yet: continue a run exactly. To go on from weights alone, give a checkpoint as --model."""


@dataclass(frozen=True)
class SafetyArguments(Settings, group="safety stops"):
    """When a run is refused or ended."""

    stop_after_zero_spread: Natural = 50
    """Stop after so many steps in a row in which no group's rewards differ; 0: never."""
    stop_after_nonfinite: Count = 5
    """Stop after so many updates in a row with a gradient that is not finite."""
    allow_no_baseline: bool = False
    """Train without a baseline also where completions may be longer than 500 tokens."""


@dataclass(frozen=True)
class TrainArguments(
    SamplingArguments,
    OptimiserArguments,
    KlArguments,
    ModelArguments,
    TaskArguments,
    LoraArguments,
    EvaluationArguments,
    RecordArguments,
    SafetyArguments,
):
    """Train a language model by policy gradients."""

    estimator: Estimator = field(default_factory=Estimator)
    """A preset (--estimator rloo), any axis of which can then be changed (--estimator.scale group_std)."""
    output_dir: str = "runs/train"
    """Directory of the run: config, metrics, completions, checkpoints, model, report."""
    max_steps: Count | None = None
    """Rollouts to train on. Default: 200."""
    prompts_per_step: Count | None = None
    """Prompts a step, over all processes. Default: 16."""
    num_generations: Count | None = None
    """Completions a prompt (the group size G). Default: 8."""
    max_completion_length: Count | None = None
    """Most tokens a completion may have, EOS included. Default: 256."""
    learning_rate: Positive | None = None
    """Peak learning rate. Default: 1e-5 (with LoRA 1e-4)."""
    seed: Natural = 0
    """Seed of prompts' order, sampling and adapters."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    check: bool = False
    """Do everything up to the first update, report, and stop."""
    cpu: bool = False
    """Stay on the CPU even if there is an accelerator."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings(TrainArguments):
    """The arguments of a run, in which nothing is left open."""

    max_steps: Count
    prompts_per_step: Count
    num_generations: Count
    max_completion_length: Count
    learning_rate: Positive
    lr_scheduler_type: Literal["constant", "linear", "cosine"]
    eval_every: Natural
    log_completions: Natural


@dataclass(frozen=True)
class SftArguments(ModelArguments, TaskArguments, LoraArguments):
    """Fine-tune a model on demonstrations: rows of prompt and completion."""

    output_dir: str = "runs/sft"
    """Directory that takes the model."""
    completion_column: str = "completion"
    """Column of a data set that holds the completion."""
    max_steps: Count | None = None
    """Updates. Default: 200."""
    batch_size: Count | None = None
    """Demonstrations an update. Default: 64."""
    learning_rate: Positive | None = None
    """Peak learning rate, falling linearly to 0. Default: 2e-5."""
    seed: Natural = 0
    """Seed of the order of demonstrations."""
    overwrite: bool = False
    """Replace the model that output_dir holds."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass(frozen=True, kw_only=True)
class SftSettings(SftArguments):
    """The arguments of a fine-tuning, in which nothing is left open."""

    max_steps: Count
    batch_size: Count
    learning_rate: Positive
