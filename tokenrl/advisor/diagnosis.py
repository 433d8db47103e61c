"""Diagnoses a run from what it has recorded.

The rules about numbers (`runs.rules`) say what is wrong; this module reads what they need from a run directory.
Whether the reward gains or falls is tested on evaluations, which are of the same held-out prompts or starting
states, each with the standard error of its mean. Two of them differ if they are farther apart than chance would
explain in one of 20 runs; the bound grows with the number of comparisons, since the best of many evaluations is
biased upwards.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

from tokenrl.advisor.advice import Advice
from tokenrl.configuration import configured
from tokenrl.control.arguments import ControlArguments
from tokenrl.errors import Refused, describe
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs.directory import in_use
from tokenrl.runs.findings import Observed, evaluations, observe
from tokenrl.runs.output import ending
from tokenrl.runs.reader import RecordedRun, read_run
from tokenrl.runs.rules import LOST_SHARE, judge

COMMANDS: dict[str, Any] = {"train": TrainArguments, "control": ControlArguments}
"""The commands whose runs can be diagnosed, with the settings of their runs."""
SURE = 1.96
"""Standard errors of a difference beyond which a reward is said to have risen: by chance in 2.5 % of runs."""
EASY_REWARD = 0.95
"""Without a threshold of its own, a task is easy from this mean reward on, which is then a success rate."""
SOLVED = "The run solves its task, or nearly all rewards are 1: take a harder task, or correct the reward."


def advise_run(path: str) -> Advice:
    """Diagnose a run of `tokenrl train` or `tokenrl control`, finished or not.

    Raises:
        Refused: there is no such run, its files are damaged, or it has made no step yet.
    """
    run = read_run(path)
    if run.kind not in COMMANDS:
        raise Refused(
            f"{path} is a run of `tokenrl {run.kind}`. Only runs with a policy gradient can be diagnosed: "
            "of `tokenrl train` and `tokenrl control`."
        )
    if not any(run.series("reward")[0]):
        raise Refused(
            f"{path} has not made a step yet, or none in which an episode ended with a finite reward. Ask "
            "again once it has come further."
        )
    arguments = configured(COMMANDS[run.kind], run.path, run.kind, anew=True)
    try:
        observed = observe_recorded(run, arguments)
        repeated = shlex.join(["tokenrl", run.kind, "--config", str(run.path / "config.json")])
        return Advice(
            f"{run.path}: {run.title}",
            SOLVED
            if observed.is_solved
            else f"Repeat it, with flags for what should change: {repeated}",
            {"status": status_of(run, arguments.max_steps)},
            judge(observed),
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Refused(
            f"{path} cannot be diagnosed: a file of it is damaged or was changed ({describe(error)})."
        ) from error


def status_of(run: RecordedRun, steps: int) -> str:
    """Return in words how far a run of so many steps has come, and how it ended."""
    summary = run.summary
    step = run.metrics[-1]["step"]
    ended = "still running" if not summary and in_use(run.path) else ending(summary)
    parts = [f"{step} of {steps} steps ({step / steps:.0%})", ended, summary.get("error")]
    return "; ".join(filter(None, parts))


def observe_recorded(run: RecordedRun, arguments: Any) -> Observed:
    """Return what the files of a run say: its settings, its last steps, and how its reward went."""
    is_language = run.kind == "train"
    observed = observe(run.metrics, arguments)
    recent = observed.recent
    rows = run.evaluations
    solved = run.config.get("solved")
    last = evaluations(rows, "reward_greedy" if is_language else "reward")[-1:]
    is_solved = any(mean.value >= float(solved) for mean in last if solved is not None)
    if solved is None and is_language:  # all rewards are 1, or nearly
        is_solved = EASY_REWARD <= recent.reward <= 1 and recent.equal > LOST_SHARE
    evaluated = evaluations(rows, "reward") or evaluations(rows, "reward_greedy")
    gained = run.summary and evaluated and evaluated[-1].exceeds(evaluated[0], SURE)
    skipped = (0.0, *run.series("skipped_steps")[1])[-1]
    latest = observed.latest
    if latest and gained:  # what was lost for a while was won back
        latest = latest._replace(signs="")
    updates = arguments.num_iterations * arguments.num_minibatches * run.metrics[-1]["step"]
    return replace(
        observed,
        is_solved=is_solved,
        is_unlearnt=bool(run.summary)
        and not gained
        and (not is_language or "nothing-learnt" in run.summary.get("flags", ())),
        whole=recent,
        skipped=skipped / updates,
        latest=latest,
    )
