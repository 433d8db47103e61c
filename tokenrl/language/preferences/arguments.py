"""Arguments of `tokenrl reward-model`, each also a keyword of `train_reward_model`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tokenrl.settings import Bounds, Count, Natural, NonNegative, Positive, Settings


@dataclass(frozen=True)
class RewardModelArguments(Settings):
    """Train a reward model on preferences: rows of prompt, chosen and rejected."""

    output_dir: str = "runs/reward-model"
    """Directory of the run: config, metrics, summary, calibration plot, model, report."""
    data: str | None = None
    """JSON/CSV/Parquet file, folder or `datasets` name with the columns chosen and rejected, and
    mostly prompt. Default: preferences made from the task."""
    task: str | None = None
    """A toy task: its tiny model is the default backbone; without data its policy and its rule-based reward
    make the preferences."""
    model: str | None = None
    """Directory or hub name of a causal LM or of a one-label classifier. Default: the task's tiny model,
    warm-started and cached."""
    base_seed: Natural = 0
    """Seed of that tiny model and its warm start."""
    hidden_size: Count | None = None
    """Width of that tiny model, a multiple of its heads such as 16 or 64. Default: the task's."""
    reward: tuple[str, ...] = ()
    """Gold reward that chooses, as in tokenrl train. Default: the task's own."""
    policy: str | None = None
    """Model whose completions are compared. Default: the task's tiny model."""
    num_pairs: Count = 2000
    """Pairs sampled for training; fewer remain where two cannot be told apart."""
    noise_temperature: NonNegative = 0.0
    """Noise of the choice: P(first chosen) = sigmoid(difference of gold rewards / this); 0: none."""
    temperature: Positive = 1.0
    """Temperature of sampling the completions."""
    max_completion_length: Count | None = None
    """Most tokens a completion may have. Default: the task's, else 256."""
    split: str = "train"
    """Split of a data set to train on."""
    eval_split: str | None = None
    """Split to evaluate on. Default: a validation or test split, else pairs held out by prompt."""
    eval_size: Count = 256
    """Pairs to evaluate on; at most a fifth of the data where they are held out."""
    max_steps: Count | None = None
    """Updates. Default: one pass over the data, after which noisy labels are soon learnt by heart."""
    batch_size: Count = 64
    """Pairs an update, in one forward pass."""
    learning_rate: Positive | None = None
    """Peak learning rate, falling linearly to 0. Default: 1e-5; for a task's tiny model 1e-3."""
    weight_decay: NonNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NonNegative = 1.0
    """Largest gradient norm; 0 clips nothing."""
    margin: float = 0.0
    """By how much the chosen reward is to exceed the other; a column `margin` says it pair by pair."""
    center_rewards_coefficient: NonNegative = 0.0
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards near 0 (TRL suggests 0.01)."""
    label_smoothing: Annotated[float, Bounds(at_least=0, below=0.5)] = 0.0
    """Assumed share of wrong labels; from 0.5 on the labels would say nothing."""
    eval_every: Count | None = None
    """Steps between evaluations. Default: a tenth of the run."""
    seed: Natural = 0
    """Seed of the data's order, the split, the sampled preferences and the new head."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    check: bool = False
    """Do everything up to the first update, report, and stop."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings(RewardModelArguments):
    """The arguments of a run, in which nothing is left open."""

    max_steps: Count
    learning_rate: Positive
    eval_every: Count
