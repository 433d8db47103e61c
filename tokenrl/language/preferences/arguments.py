"""Defines the arguments of `tokenrl reward-model`, which are also the keywords of `train_reward_model`.

The module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tokenrl.language.policy.arguments import PromptArguments
from tokenrl.language.supervised.arguments import DescentArguments
from tokenrl.language.tasks.sources import RewardNames, Task
from tokenrl.runs.checkpoint import SavingArguments
from tokenrl.runs.metrics import TrackerArguments
from tokenrl.runs.threads import ThreadArguments
from tokenrl.settings import OPEN, OR_OBJECT, Count, NonNegative, Number, Positive, Seed


@dataclass(frozen=True)
class RewardModelArguments(
    PromptArguments, DescentArguments, SavingArguments, TrackerArguments, ThreadArguments
):
    """Train a reward model on preferences: rows with a prompt, a chosen and a rejected completion."""

    output_dir: str | None = None
    """Directory of the run, for its config, metrics, summary, model and report. Default: a new one,
    runs/reward-model-1, runs/reward-model-2 and so on; with resume the newest of these."""
    data: Annotated[str, OR_OBJECT] | None = None
    """JSON/CSV/Parquet file, folder or `datasets` name with the columns chosen and rejected, and usually
    prompt. Default: preferences made from the task."""
    task: Task | None = None
    """A toy task. Its tiny model is the default backbone; without data, preferences are made by sampling
    from its policy and comparing with its rule-based reward."""
    model: Annotated[str, OR_OBJECT] | None = None
    """Directory or hub name of a causal LM or of a one-label classifier. Default: the task's tiny model,
    warm-started and cached."""
    base_seed: Seed = 0
    """Seed of that tiny model and its warm start."""
    reward: RewardNames = ()
    """Gold reward that chooses between completions, as in tokenrl train. Default: the task's own."""
    policy: Annotated[str, OR_OBJECT] | None = None
    """Model that samples the completions to compare. Default: the task's tiny model."""
    num_pairs: Count = 2000
    """Pairs sampled for training; fewer remain, because identical or equally good ones are left out."""
    noise_temperature: NonNegative = 0.0
    """Noise of the choice: P(first is chosen) = sigmoid(difference of gold rewards / this); 0: no noise."""
    temperature: Positive = 1.0
    """Temperature at which the completions are sampled."""
    max_completion_length: Count | None = None
    """Maximum number of tokens in a completion. Default: the task's, else 256."""
    split: str = "train"
    """Split of a data set to train on."""
    eval_split: str | None = None
    """Split to evaluate on. Default: a validation or test split, else pairs of about a fifth of the prompts,
    which are the same prompts that `tokenrl train` would hold out."""
    eval_size: Count = 256
    """Most pairs to evaluate on."""
    max_steps: Count = OPEN
    """Updates. Default: one pass over the data; with more, noisy labels are soon memorised."""
    batch_size: Count = 64
    """Pairs per update."""
    learning_rate: Positive = OPEN
    """Peak learning rate, falling linearly to 0. Default: 1e-5; for a task's tiny model 1e-3."""
    margin: Number = 0.0
    """By how much the chosen reward should exceed the rejected one; a column `margin` sets it per pair."""
    center_rewards_coefficient: NonNegative = 0.0
    """Weight of the penalty (r_chosen + r_rejected)^2, which keeps rewards near 0 (TRL suggests 0.01)."""
    eval_every: Count = OPEN
    """Steps between evaluations. Default: a tenth of the run."""
    seed: Seed = 0
    """Seed of the order of the data, the sampled preferences and the new head."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    check: bool = False
    """Do everything up to the first update, look for mistakes in the pairs, and stop. Exit code 0: passed
    (remarks apart); 2: there is a problem."""
    quiet: bool = False
    """Print nothing but errors."""
