"""Defines the arguments of `tokenrl compare`, which are also keywords of `compare`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tokenrl.errors import Refused
from tokenrl.files import OutputFile
from tokenrl.settings import Bounds, Count, Number, Positive, Seed, Settings, field_types, shown

BY_NAME = (
    "the runs of a comparison are other processes, which need names: a file of rows, as "
    'datasets.Dataset.from_list(rows).to_parquet("data.parquet") writes it, in task="data.parquet", a function in '
    'reward="file.py:function" or arms=("rloo", "file.py:baseline"), a saved model in model="directory".'
)


@dataclass(frozen=True)
class ProblemArguments(Settings, group="problems"):
    """What the arms are compared on. Of several tasks or environments each has a comparison of its own."""

    task: tuple[str, ...] = ()
    """Tasks, by the names that tokenrl train takes. Default, without an env: sort_digits."""
    env: tuple[str, ...] = ()
    """Environments, by the names that tokenrl control takes; it then makes the runs."""
    learning_rate: tuple[Positive | Literal["fixed", "tuned"], ...] = ("fixed",)
    """The rate of all arms that name none. fixed: the recommended rate; or numbers, of which each arm has the best;
    or tuned: the best of five rates around the recommended one. An arm may name rates itself, as in
    "rloo,learning_rate=1e-4" or "rloo,learning_rate=(1e-4,2e-4)". The best is chosen on seeds that are not compared."""


@dataclass(frozen=True)
class VerdictArguments(Settings, group="verdict"):
    """Which runs count as failed, and what programs get."""

    failure_below: Number | None = None
    """A run that ends with a lower held-out sampled reward counts as failed, like a run that breaks off."""
    require: str | None = None
    """For programs: a verdict and an arm, such as better:grpo or better|equivalent:candidate. The command exits
    with 3 if the arm has another verdict."""
    json: OutputFile | None = None
    """For programs: a file for the verdicts. It holds what comparison.json in the output directory of a comparison
    holds; of runs that exist the verdict, with the settings in which they differ."""


@dataclass(frozen=True)
class JudgementArguments(VerdictArguments, group="judgement"):
    """Which score decides, and what counts as a difference."""

    reference: str | None = None
    """The arm with which all others are compared. Default: the first arm."""
    all_pairs: bool = False
    """Compare all arms with each other, not only with the reference; a verdict then needs more evidence."""
    metric: Literal["area", "reward", "area_greedy", "reward_greedy"] = "area"
    """Score that decides. area: mean held-out sampled reward over the evaluations of the budget, without the
    evaluation before training; reward: that reward at the budget; area_greedy and reward_greedy: the same
    with greedy completions or actions."""
    margin: Positive | None = None
    """Smaller differences count as none. Default: .02 of the range that the reward declares (as an attribute:
    reward.range = (low, high), or reward.binary = True). Without a margin a difference can be found, but no
    two arms are called equivalent."""


@dataclass(frozen=True)
class JudgeArguments(VerdictArguments):
    """Judge runs that exist, or scores of any program: is the candidate better than the baseline?"""

    baseline: tuple[str, ...] = ()
    """Directories of runs of one kind, one for each seed."""
    candidate: tuple[str, ...] = ()
    """Directories of the runs that are judged beside those of --baseline. Runs that differ in task, reward, model, code
    of the reward or evaluations are refused; other settings in which they differ are listed."""
    scores: str | None = None
    """In place of runs a file in CSV: a row for each run, with arm, seed and score, with problem if there are several,
    and with failed, which is True or False, if some failed. The first arm is the reference."""
    metric: str | None = None
    """Score that decides. Of runs area, reward, area_greedy or reward_greedy, as for tokenrl compare; default: area. Of
    a file its column; default: score."""
    margin: Positive | None = None
    """Smaller differences count as none. Default: no margin, so that nothing is called equivalent."""


@dataclass(frozen=True)
class ExecutionArguments(Settings, group="execution"):
    """Where the runs are made. Each has an ordinary run directory and one thread."""

    executor: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: tasks of a Ray cluster, or of a local one that is started."""
    workers: Count | None = None
    """Number of runs at the same time. Default: one per processor."""
    collect: tuple[str, ...] = ()
    """Directories of other comparisons, as copied from other machines. Runs that have ended there with the same
    settings are copied instead of made."""
    dry_run: bool = False
    """Print the plan and the smallest difference that it can show; then stop."""


@dataclass(frozen=True)
class CompareArguments(ProblemArguments, JudgementArguments, ExecutionArguments):
    """Compare baselines, or other settings, over seeds: which is best, and how certain that is.

    Every other flag of tokenrl train (with --env: of tokenrl control) is taken too, and holds for all runs,
    such as --max-steps 100, --optimizer sgd or --estimator.aggregation sequence_mean. Killed and started
    again, a comparison continues.
    """

    arms: tuple[str, ...] = ("reinforce", "reinforce_running_mean", "rloo", "grpo")
    """What is compared: presets (rloo), presets with other axes or settings ("grpo,scale=none",
    "rloo,num_generations=4,max_grad_norm=0"), baselines of your own (mine.py:baseline). And two controls of language
    models, the reference with --control-arm: random learns from rewards that have changed places, best_of_n learns
    nothing and searches for the best completion of each held-out prompt. Their verdicts count like others among those
    that share the error."""
    seeds: tuple[Annotated[int, Bounds(at_least=2, at_most=1000)], ...] = (6,)
    """Runs of each arm. Below 6 the numbers are shown without a verdict. Several rising numbers, such as 8 12 16,
    are looks: after so many runs of each arm the scores are judged, and arms that are decided make no more. The
    looks share the error, so together they err hardly more often than one look would."""
    first_seed: Seed = 0
    """The first seed; the others follow it."""
    output_dir: str = "runs/compare"
    """Directory of the comparison: plan.json, runs/, runs.csv, comparisons.csv, comparison.json and
    report.html; of several tasks each has such a directory in it."""
    quiet: bool = False
    """Print nothing but errors."""
    shared: Mapping[Any, Any] = field(default_factory=dict, metadata={"flag": False})
    """Settings of tokenrl train or tokenrl control that all runs share."""

    def __post_init__(self) -> None:
        """Check the values; the shared settings are checked together with those of each run."""
        if not isinstance(self.shared, Mapping):
            raise Refused(
                f"shared was given as {shown(self.shared)}; it must map settings to their values."
            )
        shared = {name: self.shared.get(name) for name in ("model", "reward")}
        for name, value in {"task": self.task, "arms": self.arms, **shared}.items():
            parts = value if isinstance(value, tuple | list) else [value]
            if not all(isinstance(part, str | None) for part in parts):
                raise Refused(f"{name} was given as {shown(value)}; {BY_NAME}")
        super().__post_init__()
        if self.json and len(self.task) + len(self.env) > 1:
            raise Refused(
                "json names one file; read comparison.json in the directory of each task."
            )


def with_shared(options: Mapping[str, Any]) -> dict[str, Any]:
    """Put the options that are settings of the runs, and not of the comparison itself, under `shared`."""
    fields = field_types(CompareArguments)
    own = {name: value for name, value in options.items() if name in fields}
    of_runs = {name: value for name, value in options.items() if name not in fields}
    shared = own.get("shared", {})
    if isinstance(shared, Mapping):  # which the arguments refuse if it is none
        own["shared"] = {**shared, **of_runs}
    return own
