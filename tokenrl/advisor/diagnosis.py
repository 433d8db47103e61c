"""Diagnoses a run from what it has recorded, and recommends what to change when it is run again.

The rules about numbers (`runs.rules`) say what is wrong; this module reads their facts from a run directory.
Whether the reward falls is tested on evaluations, which are of the same held-out prompts or starting states,
each with the standard error of its mean. Without evaluations, quarters of the training steps are compared.
The reward has gained if the last evaluation or the last quarter is above the first: quarters have many more
samples. Two means differ if they are farther apart than chance would explain in one of 20 runs; the bound
grows with the number of comparisons, since the best of many evaluations is biased upwards.
"""

from __future__ import annotations

import math
import shlex
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

import gymnasium
import numpy as np

from tokenrl.advisor.advice import Advice, advised, flags, merge, with_changes
from tokenrl.configuration import configured
from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import OWN
from tokenrl.errors import Refused, describe
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs.console import ending
from tokenrl.runs.directory import in_use
from tokenrl.runs.findings import LOST_SHARE, Part, facts
from tokenrl.runs.reader import RecordedRun, finite, read_run
from tokenrl.runs.rules import judge

COMMANDS: dict[str, Any] = {"train": TrainArguments, "control": ControlArguments}
"""The commands whose runs can be diagnosed, with the settings of their runs."""
SHOWN = ("now_", "peak_", "recent_", "solved_at", "is_solved")
"""How the names of facts begin that are shown, in this order; the others are settings."""
FALSE_ALARMS = 0.05
"""Probability that a run whose reward does not change is said to change."""
MIN_STEPS = 5
"""Fewest steps whose mean is compared with another: the error of fewer is too uncertain."""
EASY_REWARD = 0.95
"""Without a threshold of its own, a task is easy from this mean reward on, which is then a success rate."""
SOLVED = """The run solves its task: its last evaluation (greedy, of a language model) reaches solved_at, or
nearly all rewards are 1. So there is nothing to change, and no command. Take a harder task; or, if the
answers do not deserve their rewards, correct the reward."""
UNCHANGED = (
    "No setting needs a change, so there is no command. Longer training (--max-steps) may yet gain."
)


class Mean(NamedTuple):
    """A mean, its standard error, and the last of its steps."""

    value: float
    error: float
    step: int


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
    try:
        return _diagnosed(run)
    except Refused:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Refused(
            f"{path} cannot be diagnosed: a file of it is damaged or was changed ({describe(error)})."
        ) from error


def _diagnosed(run: RecordedRun) -> Advice:
    arguments = configured(COMMANDS[run.kind], run.path, run.kind, anew=True)
    observed = run_facts(run, arguments)
    findings = judge(observed)
    changes = {} if observed["is_solved"] else merge(findings)
    line = ["tokenrl", run.kind, "--config", str(run.path / "config.json"), *flags(changes)]
    measured = {"status": _status(run, arguments)}
    arguments = with_changes(arguments, changes)
    for start in SHOWN:
        for name, value in observed.items():
            if name.startswith(start) and finite(value) is not None:
                measured[name] = value
    return Advice(
        subject=f"{run.path}: {run.title}",
        command=run.kind,
        arguments=arguments,
        line=shlex.join(line) if changes else "",
        measured=measured,
        findings=advised(findings, arguments),
        unchanged=SOLVED if observed["is_solved"] else UNCHANGED,
    )


def run_facts(run: RecordedRun, arguments: Any) -> dict[str, Any]:
    """Return the facts of a run, of its settings and of how its reward went."""
    is_language = run.kind == "train"
    step = run.metrics[-1]["step"]
    skipped = run.series("skipped_steps")[1]
    spread = run.series("reward_std")[1]
    evaluated = run.series("eval_reward_greedy" if is_language else "eval_reward")[1]
    solved = run.config.get("solved")
    mark = None if solved is None else float(solved)  # "Infinity" too
    numbers = _progress_facts(run, arguments)
    numbers["horizon"] = (
        arguments.max_completion_length if is_language else _horizon(run, arguments)
    )
    numbers["solved_at"] = mark
    numbers["is_whole"] = step >= arguments.max_steps
    if skipped:
        numbers["skipped"] = skipped[-1] / (
            step * arguments.num_iterations * arguments.num_minibatches
        )
    if spread:
        numbers["early_spread"] = fmean(spread[: max(1, len(spread) // 10)])
    if not is_language and (arguments.num_envs == 1 or arguments.estimator.within_rows):
        numbers["recent_equal"] = None  # episodes are not compared, so equal returns say nothing
    parts: list[Part] = ["recent"]
    if is_language and not numbers["gained"]:
        parts += ["first", "latest"]
    observed = facts(run.metrics, arguments, *parts, **numbers)
    reward = observed["recent_reward"]
    if mark is None:
        is_easy = is_language and EASY_REWARD <= reward <= 1
        is_solved = is_easy and observed["recent_equal"] > LOST_SHARE  # all 1, or nearly
    else:
        is_easy = reward >= mark
        is_solved = bool(evaluated) and evaluated[-1] >= mark
    return observed | {"is_solved": is_solved, "is_easy": is_easy or is_solved}


def _progress_facts(run: RecordedRun, arguments: Any) -> dict[str, Any]:
    """Return whether the reward has gained or fallen by more than chance, and its value at its best."""
    parts = quarters(run)
    evaluated = evaluations(run)
    compared = evaluated if len(evaluated) > 1 else parts
    now = compared[-1]
    peak = max(compared)
    comparisons = len(compared) - 1
    is_running = not run.summary and in_use(run.path)
    gained = any(_difference(means[-1], means[0], 2) > 0 for means in (compared, parts))
    is_judged = run.kind == "train" and len(evaluated) > 1 and "flags" in run.summary
    if is_judged and run.summary["exit_reason"] == "finished":
        gained = "nothing-learnt" not in run.summary["flags"]  # the run compared the same prompts
    kl = [value for step, value in zip(*run.series("kl"), strict=True) if step <= peak.step]
    is_half_done = 2 * run.metrics[-1]["step"] >= arguments.max_steps
    return {
        "now_reward": now.value,
        "peak_reward": peak.value,
        "peak_step": peak.step,
        "peak_kl": kl[-1] if kl else None,
        "gained": gained,
        "fell": _difference(now, peak, comparisons) < 0,
        "rising": gained and not is_running and _difference(parts[-1], parts[-2:][0], 1) > 0,
        "is_early": not comparisons or (is_running and not is_half_done),
    }


def evaluations(run: RecordedRun) -> list[Mean]:
    """Return the evaluations that have a standard error, of sampled rewards or else of greedy ones."""
    for name in ("reward", "reward_greedy"):
        rows = [row for row in run.evaluations if row.get(name) is not None]
        if rows and all(row.get(f"{name}_stderr") is not None for row in rows):
            return [Mean(row[name], row[f"{name}_stderr"], row["step"]) for row in rows]
    return []


def quarters(run: RecordedRun) -> list[Mean]:
    """Return the mean training reward of each quarter of the steps; of fewer parts if there are few steps."""
    steps, rewards = run.series("reward")
    count = max(1, min(4, len(rewards) // MIN_STEPS))
    means = []
    parts = zip(np.array_split(steps, count), np.array_split(rewards, count), strict=True)
    for numbers, values in parts:
        error = math.nan
        if len(values) > 1:
            error = float(values.std(ddof=1)) / math.sqrt(len(values))
        means.append(Mean(float(values.mean()), error, int(numbers[-1])))
    return means


def _difference(mean: Mean, reference: Mean, comparisons: int) -> int:
    """Return 1 if `mean` exceeds `reference` by more than chance, -1 if it is as far below it, else 0."""
    errors = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2 / max(1, comparisons))
    bound = errors * math.hypot(mean.error, reference.error)
    difference = mean.value - reference.value
    return (difference > bound) - (difference < -bound)


def _horizon(run: RecordedRun, arguments: ControlArguments) -> float:
    """Return the most actions of an episode, as the run recorded it; infinity where that cannot be told.

    A run of an earlier release has not recorded it. Of its environment only a registered name is looked up:
    no file or module that a run names is imported, because a diagnosis executes nothing of the run.
    """
    env = OWN[arguments.env][0] if arguments.env in OWN else arguments.env
    spec = gymnasium.registry.get(env)
    registered = spec.max_episode_steps if spec else None
    return run.config.get("horizon") or arguments.max_episode_steps or registered or math.inf


def _status(run: RecordedRun, arguments: Any) -> str:
    """Return how far the run has come, and how it ended."""
    step = run.metrics[-1]["step"]
    summary = run.summary
    ended = "still running" if not summary and in_use(run.path) else ending(summary)
    error = f"; {summary['error']}" if "error" in summary else ""
    share = step / arguments.max_steps
    return f"{step} of {arguments.max_steps} steps ({share:.0%}); {ended}{error}"
