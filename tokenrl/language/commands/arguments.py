"""Defines the arguments of `tokenrl sample` and `tokenrl evaluate`. The module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tokenrl.configuration import TrustArguments
from tokenrl.language.policy.arguments import LoadingArguments, PromptArguments
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.settings import OPEN, OR_OBJECT, Bounds, Count, Natural, Number, Positive, Seed


@dataclass(frozen=True)
class OpenTaskArguments(TaskArguments, group="data"):
    """How prompts are read, and how rewards are weighted and called. Left out: as in the model's run."""

    task: Annotated[str, OR_OBJECT] = OPEN
    """As in train. Default: that of the run, if there is one."""
    reward: Annotated[tuple[str, ...], OR_OBJECT] = OPEN
    """As in train. Default: that of the run for the same task, else the task's own reward."""
    reward_weights: tuple[Number, ...] = OPEN
    """One weight per reward. Default: those of the run for the same rewards, else 1 for each."""
    max_turns: Count = OPEN
    """Turns of the policy after which an episode ends. Default: that of the run, else 10."""
    share_seed: bool = OPEN
    """As in train. Default: as in the run, else shared."""
    malformed: Literal["end", "observe"] = OPEN
    """As in train. Default: that of the run, else end."""
    prompt_column: str = OPEN
    """Column of a dataset that holds the prompt. Default: that of the run, else prompt."""
    split: str = OPEN
    """Split of a dataset to train on, of which rows are held out if it has no other. Default: that of the
    run, else train."""

    def __post_init__(self) -> None:
        """Check the values; an open task stays open until the model's run is read."""
        super(TaskArguments, self).__post_init__()


@dataclass(frozen=True)
class SampleArguments(
    Distribution, OpenTaskArguments, PromptArguments, LoadingArguments, TrustArguments
):
    """Complete the prompts given, or prompts read line by line, and print them with their rewards.

    With the directory of a run, its `model/` or a checkpoint, the task with its data, its reward and the
    length of completions are the run's unless you give them. With --task for another task only the length is
    the run's, unless that task has a limit. If the run's task or reward cannot be used, completions have no
    rewards. Code that the run names is executed only if you trained the run with it yourself, or with
    --trust-run.
    """

    model: str = ""
    """Local directory or hub name."""
    prompt: tuple[str, ...] = ()
    """One or more prompts. Default: ask for them, or read them as lines from a pipe."""
    task: Annotated[str, OR_OBJECT] = OPEN
    """Print the rewards of this task beside each completion; named as in train. Prompts that are none of the
    task's are answered too, without a reward where it needs more than the prompt. Default: that of the run,
    if there is one; --reward also works without a task."""
    num_generations: Natural = 4
    """Completions per prompt; 0: only the greedy one."""
    max_completion_length: Count | None = None
    """Maximum number of tokens in a completion. Default: that of the run, else the task's, else 64, but at
    most what the context leaves."""
    seed: Seed = 0
    """Seed of sampling."""


@dataclass(frozen=True)
class EvaluateArguments(OpenTaskArguments, PromptArguments, LoadingArguments, TrustArguments):
    """Evaluate one or more models on a task's held-out prompts, by greedy and by sampled completions.

    With the directory of a run, its `model/` or a checkpoint, the settings of that run hold unless you give
    others. They are the task with its data, its reward, the length of completions, the distribution of tokens
    (temperature, top_k, top_p, min_p) and the seed. With --task for another task only the distribution, the
    seed and the length are the run's; a limit of that task replaces the length. Several runs must agree,
    except in their seeds: the first seed counts. Code that a run names is executed only if you trained the
    run with it yourself, or with --trust-run.
    """

    model: str | tuple[str, ...] = ""
    """Local directory or hub name. Several are evaluated one after the other, on the same prompts and with
    the same random numbers, and each is compared with the first, prompt by prompt."""
    num_generations: Natural | None = None
    """Sampled completions per prompt, besides the greedy one; 0: none. Default: 4, or the largest k."""
    k: tuple[Count, ...] = ()
    """Values of k for pass@k and best@k. pass@k needs a reward that says what is right: one that is declared
    binary, a threshold of the task, or --pass-threshold. Default: 1 and num_generations."""
    pass_threshold: Number | None = None
    """Least total reward with which a completion is right, for pass@k. Default: 1 for a single reward that is
    declared binary (of the library: exact_match, numeric_answer, regex_format; or a function with
    `function.binary = True`), else the threshold of the task, if it has one."""
    best_of: Natural = 0
    """Largest n of best-of-n. This many completions are sampled for each prompt, the rewards named by
    --reward choose among them, and the task's own reward measures the choice. 0: not measured."""
    reference: str | None = None
    """Directory or hub name of the model that training started from; the KL to it is reported, of each
    completion up to where this model ends."""
    max_completion_length: Count | None = None
    """Maximum number of tokens in a completion. Default: that of the run, but for another task its own limit,
    if it has one; without a run the task's, else 256."""
    temperature: Positive | None = None
    """Temperature at which completions are sampled. Default: that of the run, else 1."""
    top_k: Natural | None = None
    """As in train. Default: that of the run, else 0, which leaves no token out."""
    top_p: Annotated[float, Bounds(above=0, at_most=1)] | None = None
    """As in train. Default: that of the run, else 1, which leaves no token out."""
    min_p: Annotated[float, Bounds(at_least=0, below=1)] | None = None
    """As in train. Default: that of the run, else 0, which leaves no token out."""
    truncate_prompts: bool | None = None
    """Cut prompts that are too long for the context on the left, instead of refusing them. Default: as in the
    run, else refused."""
    seed: Seed | None = None
    """Seed of sampling. Default: that of the run, else 0."""
    json: str | None = None
    """Also write the numbers to this file; those of several models by the model's name."""
    quiet: bool = False
    """Print no warnings and no remarks, only the results of the command and errors."""
