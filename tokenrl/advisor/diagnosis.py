"""Diagnoses a run from what it has recorded, and recommends what to change when it is run again.

The rules about numbers (`runs.rules`) say what is wrong; this module reads their facts from a run directory.
Whether the reward falls is tested on evaluations, which are of the same held-out prompts or starting states,
each with the standard error of its mean. Where there are none, quarters of the training steps are compared.
It has gained if either the last evaluation or the last quarter is above the first: quarters have many more
samples. Two means differ if they are farther apart than chance would explain in one of 20 runs; the bound
grows with the number of comparisons, since the best of many evaluations is also the luckiest.
"""

from __future__ import annotations

import math
import shlex
from statistics import NormalDist, fmean, stdev
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
from tokenrl.runs.findings import MOST, Part, facts
from tokenrl.runs.reader import RecordedRun, read_run
from tokenrl.runs.rules import judge

KINDS: dict[str, Any] = {"train": TrainArguments, "control": ControlArguments}
"""The commands whose runs can be diagnosed, with the settings of their runs."""
SHOWN = ("now_", "peak_", "recent_", "solved_at", "snr", "is_solved")
"""How the names of facts begin that are shown, in this order; the others are settings."""
FALSE_ALARMS = 0.05
"""Probability that a run whose reward does not change is said to change."""
LEAST_STEPS = 5
"""Fewest steps whose mean is compared with that of others: the error of fewer is too uncertain."""
RECORDED = (
    "learning_rate",
    "max_steps",
    "prompts_per_step",
    "num_generations",
    "max_completion_length",
)
"""Settings of which every run has a number in config.json, if its command has them."""
SOLVED = """The run solves its task: its last evaluation (greedy, of a language model) reaches solved_at, or
nearly all rewards are 1. So there is nothing to change, and no command. Take a harder task; or, if the
answers do not deserve their rewards, mend the reward."""
UNCHANGED = (
    "No setting needs a change, so there is no command. Longer training (--max-steps) may yet gain."
)


class Mean(NamedTuple):
    """A mean, its standard error, and the last of the steps that it is from."""

    value: float
    error: float
    step: int


def advise_run(path: str) -> Advice:
    """Diagnose a run of `tokenrl train` or `tokenrl control`, finished or not.

    Raises:
        Refused: there is no such run, its files are damaged, or it has made no step yet.
    """
    run = read_run(path)
    if run.kind not in KINDS:
        raise Refused(
            f"{path} is a run of `tokenrl {run.kind}`. Only runs with a policy gradient can be diagnosed: "
            "those of `tokenrl train` and `tokenrl control`."
        )
    if not any(run.series("reward")[0]):
        raise Refused(
            f"{path} has not made a step yet, or none in which an episode ended with a finite reward. Ask "
            "again once it has come further."
        )
    try:
        return _diagnosed(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(
            f"{path} cannot be diagnosed: a file of it is damaged or was changed ({describe(error)})."
        ) from error


def _diagnosed(run: RecordedRun) -> Advice:
    arguments = configured(KINDS[run.kind], run.path, run.kind, anew=True)
    if lacking := [name for name in RECORDED if getattr(arguments, name, 0) is None]:
        path, names = run.path / "config.json", " and ".join(lacking)
        raise Refused(
            f"{path} has no number for {names}, as every run records. Put back what it was."
        )
    observed = run_facts(run, arguments)
    findings = judge(observed)
    changes = {} if observed["is_solved"] else merge(findings)
    numbers = {
        name: value for name, value in observed.items() if value is not None and value == value
    }
    changed = with_changes(arguments, changes)
    words = ["tokenrl", run.kind, "--config", str(run.path / "config.json"), *flags(changes)]
    return Advice(
        subject=f"{run.path}: {run.title}",
        command=run.kind,
        arguments=changed,
        line=shlex.join(words) if changes else "",
        measured={"status": _progress(run, arguments)}
        | {name: numbers[name] for start in SHOWN for name in numbers if name.startswith(start)},
        findings=advised(findings, changed),
        unchanged=SOLVED if observed["is_solved"] else UNCHANGED,
    )


def run_facts(run: RecordedRun, arguments: Any) -> dict[str, Any]:
    """Return the facts of a run, of its settings and of how its reward went."""
    language, last = run.kind == "train", run.metrics[-1]
    snr, skipped = run.series("gradient/snr")[1], run.series("skipped_steps")[1]
    spread = run.series("reward_std")[1]
    step, samples = last["step"], getattr(arguments, "max_samples", None)
    updates = step * arguments.num_iterations * arguments.num_minibatches
    mark = (
        None if run.config.get("solved") is None else float(run.config["solved"])
    )  # "Infinity" too
    evaluated = run.series("eval_reward_greedy" if language else "eval_reward")[1]
    numbers = _progress_facts(run, arguments) | {
        "horizon": arguments.max_completion_length if language else _horizon(run, arguments),
        "solved_at": mark,
        "is_whole": (last.get("num_samples") or 0) >= samples
        if samples
        else step >= arguments.max_steps,
        "skipped": skipped[-1] / updates if skipped else None,
        "snr": fmean(snr) if snr else None,
        "snr_stderr": stdev(snr) / math.sqrt(len(snr)) if len(snr) > 1 else None,
        "early_spread": fmean(spread[: max(1, len(spread) // 10)]) if spread else None,
        "is_solved": mark is not None and bool(evaluated) and evaluated[-1] >= mark,
    }
    if not language and (arguments.num_envs == 1 or arguments.estimator.within_rows):
        numbers["recent_equal"] = (
            None  # episodes are not compared, so that equal returns say nothing
        )
    parts: list[Part] = (
        ["recent"] if numbers["gained"] or not language else ["recent", "first", "latest"]
    )
    observed = facts(run.metrics, arguments, *parts, **numbers)
    least, most = (0.95, 1.0) if mark is None else (mark, math.inf)
    is_easy = (language or mark is not None) and least <= observed["recent_reward"] <= most
    observed["is_solved"] |= (
        mark is None and is_easy and observed["recent_equal"] > MOST
    )  # all 1, or nearly
    return observed | {"is_easy": observed["is_solved"] or is_easy}


def _progress_facts(run: RecordedRun, arguments: Any) -> dict[str, Any]:
    """Return whether the reward has gained or fallen by more than chance, and what it was at its best."""
    parts, evaluated = quarters(run), evaluations(run)
    compared = evaluated if len(evaluated) > 1 else parts
    now, peak = compared[-1], max(compared)
    comparisons, running = len(compared) - 1, not run.summary and in_use(run.path)
    gained = any(_differs(means[-1], means[0], 2) > 0 for means in (compared, parts))
    flags = run.summary.get("flags") if run.kind == "train" and len(evaluated) > 1 else None
    if flags is not None and run.summary["exit_reason"] == "finished":
        gained = (
            "nothing-learnt" not in flags
        )  # the run compared the same prompts, which this cannot
    rising = len(parts) > 1 and _differs(parts[-1], parts[-2], 1) > 0
    kl = [value for at, value in zip(*run.series("kl"), strict=True) if at <= peak.step]
    return {
        "now_reward": now.value,
        "peak_reward": peak.value,
        "peak_step": peak.step,
        "peak_kl": kl[-1] if kl else None,
        "gained": gained,
        "fell": _differs(now, peak, comparisons) < 0,
        "rising": rising and gained and not running,
        "is_early": not comparisons
        or (running and 2 * run.metrics[-1]["step"] < arguments.max_steps),
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
    rewards = np.transpose(run.series("reward"))
    parts = np.array_split(rewards, max(1, min(4, len(rewards) // LEAST_STEPS)))
    means = []
    for steps, values in (part.T for part in parts):
        error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        means.append(Mean(float(values.mean()), float(error), int(steps[-1])))
    return means


def _differs(mean: Mean, reference: Mean, comparisons: int) -> int:
    """Return 1 if `one` is larger than `other` by more than chance, -1 if smaller, else 0."""
    sure = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2 / max(1, comparisons))
    bound, difference = sure * math.hypot(mean.error, reference.error), mean.value - reference.value
    return (difference > bound) - (difference < -bound)


def _horizon(run: RecordedRun, arguments: ControlArguments) -> float:
    """Return the most actions of an episode, as the run recorded it; infinity where that cannot be told.

    A run of an earlier release has not recorded it. Of its environment only a registered name is looked up:
    no file or module that a run names is imported, because a diagnosis executes nothing of the run.
    """
    recorded, env = run.config.get("horizon"), arguments.env
    spec = gymnasium.registry.get(OWN[env][0] if env in OWN else env)
    return recorded or arguments.max_episode_steps or (spec and spec.max_episode_steps) or math.inf


def _progress(run: RecordedRun, arguments: Any) -> str:
    """Return how far the run has come, and how it ended."""
    step, summary = run.metrics[-1]["step"], run.summary
    ended = "still running" if not summary and in_use(run.path) else ending(summary)
    error = f"; {summary['error']}" if "error" in summary else ""
    return (
        f"{step} of {arguments.max_steps} steps ({step / arguments.max_steps:.0%}); {ended}{error}"
    )
