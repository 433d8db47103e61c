"""Defines the arguments of `tokenrl sample` and `tokenrl evaluate`. The module imports no torch.

Where a field is `as_in_run`, the run that saved the model decides what is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenrl.configuration import TrustArguments
from tokenrl.files import OutputFile
from tokenrl.language.policy.arguments import (
    LoadingArguments,
    LoraArguments,
    ModelArguments,
    PromptArguments,
)
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.tasks.sources import Task, TaskArguments
from tokenrl.settings import Count, Natural, Number, Seed, as_in_run


@dataclass(frozen=True)
class OpenTaskArguments(TaskArguments, group="data", leaves_open=True):
    """How prompts are read, and how rewards are weighted and called. Default: as in the run for the same task."""

    task: Task = as_in_run(None)
    """As in train; evaluate needs it for a model of no run."""

    def __post_init__(self) -> None:
        """Check the values; an open task stays open until the model's run is read."""
        super(TaskArguments, self).__post_init__()


@dataclass(frozen=True)
class OpenDistribution(Distribution, group="sampling", leaves_open=True):
    """How completions are sampled: from which tokens, with which probabilities. Default: as in the run."""


@dataclass(frozen=True)
class OpenModelArguments(
    OpenDistribution, ModelArguments, OpenTaskArguments, LoraArguments, TrustArguments
):
    """Which model is differentiated, and on which task. Default: as in the run that saved the model."""


@dataclass(frozen=True)
class SampleArguments(
    Distribution, OpenTaskArguments, PromptArguments, LoadingArguments, TrustArguments
):
    """Complete the prompts given, or prompts read line by line, and print them with their rewards.

    With the directory of a run, its `model/` or a checkpoint, the task with its data, its reward and the
    length of completions are the run's unless you give them. With --task for another task only the length is
    the run's, unless that task has a limit. If the run's task or reward cannot be used, completions have no
    rewards. Prompts that are none of the task's are answered too, without a reward where it needs more than
    the prompt; --reward also works without a task. Code that the run names is executed only if you have
    trained with it yourself, or with --trust-run.
    """

    model: str = ""
    """Local directory or hub name. On a command line it may stand first without its flag: tokenrl sample runs/a."""
    prompt: tuple[str, ...] = ()
    """One or more prompts. Default: ask for them, or read them as lines from a pipe."""
    num_generations: Natural = 4
    """Completions per prompt; 0: only the greedy one."""
    max_completion_length: Count = as_in_run(None)
    """Maximum number of tokens in a completion. Without a run it is the task's, else 64, but at most what the
    context leaves."""
    seed: Seed = 0
    """Seed of sampling."""
    tokens: bool = False
    """Print below each completion its tokens, one a line, with log-probability and entropy under the model."""


@dataclass(frozen=True)
class EvaluateArguments(
    OpenDistribution, OpenTaskArguments, PromptArguments, LoadingArguments, TrustArguments
):
    """Evaluate one or more models on a task's held-out prompts, by greedy and by sampled completions.

    With the directory of a run, its `model/` or a checkpoint, the settings of that run hold unless you give
    others. They are the task with its data, its reward, the length of completions, the distribution of tokens
    (temperature, top_k, top_p, min_p) and the seed. With --task for another task only the distribution, the
    seed and the length are the run's; a limit of that task replaces the length. Several runs must agree,
    except in their seeds: the first seed counts. Code that a run names is executed only if you have
    trained with it yourself, or with --trust-run.
    """

    model: str | tuple[str, ...] = ""
    """Local directory or hub name. Several are evaluated one after the other, on the same prompts and with
    the same random numbers, and each is compared with the first, prompt by prompt. On a command line they may
    stand first without their flag: tokenrl evaluate runs/a runs/b."""
    num_generations: Natural | None = None
    """Sampled completions per prompt, besides the greedy one; 0: none. Default: 4, or the largest k."""
    k: tuple[Count, ...] = ()
    """Values of k for pass@k and best@k. pass@k needs a reward that says what is right: one that is declared
    binary, a threshold of the task, or --pass-threshold. Default: 1 and num_generations."""
    pass_threshold: Number | None = None
    """Least total reward with which a completion is right, for pass@k. Default: 1 for a single reward that is
    declared binary (as exact_match of the library, or a function with `function.binary = True`), else the
    threshold of the task, if it has one."""
    best_of: Natural = 0
    """Largest n of best-of-n. This many completions are sampled for each prompt, the rewards named by
    --reward choose among them, and the task's own reward measures the choice. 0: not measured."""
    reference: str | None = None
    """Directory or hub name of the model that training started from; the KL to it is reported, of each
    completion up to where this model ends."""
    max_completion_length: Count = as_in_run(None)
    """Maximum number of tokens in a completion. For another task than the run's it is that task's limit, if it
    has one; without a run it is the task's, else 256."""
    truncate_prompts: bool = as_in_run(False)
    """Cut prompts that are too long for the context on the left, instead of refusing them."""
    seed: Seed = as_in_run(0)
    """Seed of sampling."""
    json: OutputFile | None = None
    """Also write the numbers to this file; those of several models by the model's name."""
    quiet: bool = False
    """Print no warnings and no remarks, only the results of the command and errors."""
