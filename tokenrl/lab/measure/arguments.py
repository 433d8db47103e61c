"""The arguments of `tokenrl lab measure`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tokenrl.files import OutputFile
from tokenrl.language import OpenModelArguments
from tokenrl.settings import OR_OBJECT, Count, Seed, Several, as_in_run

DEFAULT_ESTIMATORS = (
    "reinforce",
    "reinforce_running_mean",
    "reinforce_baseline",
    "remax",
    "rloo",
    "opo_loo",
    "shrinkage",
    "rloo_token_mean",
    "dr_grpo",
    "grpo",
    "grpo_no_std",
    "dapo",
    "gspo",
    "reinforce_pp",
)


OF_TEACHER = ("rloo", "opd", "opd_to_go")


@dataclass(frozen=True)
class MeasureArguments(OpenModelArguments):
    """Measure signal, noise and direction of the gradients of estimators, on the same completions.

    With the directory of a run, its `model/` or a checkpoint, the task with its data, its reward, the length of
    completions and the distribution of tokens are the run's unless you give others. Code that the run names
    is executed only if you have trained with it yourself, or with --trust-run.
    """

    task: Annotated[str, OR_OBJECT] = as_in_run(None)
    """As in train; a model of no run needs it. Default: that of the run, and without a model sort_digits."""

    estimators: tuple[str, ...] = ()
    """Presets to measure. Default: fourteen without a KL; with a teacher rloo, opd and opd_to_go."""
    teacher: Annotated[str, OR_OBJECT] | None = None
    """A model whose signal is measured beside that of the rewards, as in train. Estimators with a KL are
    measured on the KL to it alone, all rewards being 0; their cosine is that to the gradient of the reward."""
    num_prompts: Count = 128
    """Number of training prompts, drawn at random by the seed; more make the intervals narrower. With fewer than
    some 20 groups of unequal rewards the intervals are too narrow."""
    num_generations: Several = 8
    """Completions per prompt (G)."""
    prompts_per_step: Count = 8
    """Prompts per step; the noise is that of one step, within which some estimators compare prompts."""
    max_completion_length: Count = as_in_run(None)
    """Most tokens a completion may have. Without a run it is the task's, else 256."""
    probes: Several = 256
    """Random directions to project gradients on; squared lengths have the relative error sqrt(2/probes)."""
    layers: tuple[str, ...] = ()
    """Use only parameters with one of these in their name, such as `layers.0.` or `lm_head`."""
    rows_at_once: Count | None = None
    """Completions per forward pass; with fewer, memory suffices for larger models, and no number changes.
    Default: as many as have 16 million logits, at most 1024."""
    cpu: bool | None = None
    """As in train."""
    seed: Seed = 0
    """Seed of the prompts, of sampling, of the random directions, of the intervals and of a new adapter."""
    json: OutputFile | None = None
    """Also write all numbers to this file."""
    quiet: bool = False
    """Print nothing but errors."""
