"""Diagnoses a run from what it has recorded, and recommends what to change when it is run again.

The rules about numbers (`runs.rules`) say what is wrong; this module reads their facts from a run directory.
Whether the reward rises is tested on evaluations, which are of the same held-out prompts or starting states,
each with the standard error of its mean. Where there are none, quarters of the training steps are compared.
Two means differ if they are farther apart than chance would explain in one of 20 runs; the bound grows with
the number of comparisons, since the best of many evaluations is also the luckiest.
"""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from tokenrl.advisor.advice import Advice, flags, one_figure
from tokenrl.configuration import configured
from tokenrl.control.arguments import ControlArguments, ControlSettings
from tokenrl.errors import Refused
from tokenrl.language.training.arguments import TrainArguments, TrainSettings
from tokenrl.runs.facts import last_tenth, latest_facts, means
from tokenrl.runs.findings import Finding
from tokenrl.runs.reader import RecordedRun, read_run
from tokenrl.runs.rules import judge
from tokenrl.settings import settled

KINDS: dict[str, tuple[Any, Any]] = {
    "train": (TrainArguments, TrainSettings),
    "control": (ControlArguments, ControlSettings),
}
"""The commands whose runs can be diagnosed, with their arguments and the settings of their runs."""
FALSE_ALARMS = 0.05
"""Probability that a run whose reward does not change is said to change."""
LEAST_STEPS = 5
"""Fewest steps whose mean is compared with that of others: the error of fewer is too uncertain."""


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
    run, arguments = _read(path)
    facts = run_facts(run, arguments)
    findings = judge(facts)
    changes = together(findings)
    target = _unused(run.path)
    words = ["tokenrl", run.kind, "--config", str(run.path / "config.json"), "--output-dir", str(target)]
    axes = {n.removeprefix("estimator."): v for n, v in changes.items() if n.startswith("estimator.")}
    own = {name: value for name, value in changes.items() if not name.startswith("estimator.")}
    own |= {"output_dir": str(target), "overwrite": False}
    return Advice(
        subject=str(run.path),
        command=run.kind,
        arguments=replace(arguments, **own, estimator=replace(arguments.estimator, **axes)),
        facts=_shown(run, arguments, facts),
        measurements={"changes": changes, "facts": {k: v for k, v in facts.items() if v is not None}},
        findings=findings,
        again=shlex.join([*words, *flags(changes)]),
    )


def _read(path: str) -> tuple[RecordedRun, Any]:
    """Read a run directory and the arguments of the run."""
    if not os.path.isfile(Path(path) / "config.json"):
        raise Refused(
            f"{path} holds no run: there is no config.json in it. Give the output directory of `tokenrl "
            "train` or `tokenrl control`; a run writes that file once it has evaluated the first policy."
        )
    run = read_run(path)
    kind = run.config.get("kind")
    if kind not in KINDS:
        raise Refused(
            f"{path} is a run of {f'`tokenrl {kind}`' if kind else 'an unknown command'}. Only runs with a "
            "policy gradient can be diagnosed: give the output directory of `tokenrl train` or `tokenrl "
            "control`."
        )
    if not any(run.series("reward")[0]):
        raise Refused(
            f"{path} has not made a step yet, or none in which an episode ended with a finite reward: none "
            f"of the {len(run.metrics)} lines of its metrics.jsonl has one. Ask again once it has come "
            "further."
        )
    arguments, settings = KINDS[kind]
    arguments = configured(arguments, run.path, kind)
    settled(settings, arguments, {})  # refuses what a run never leaves open
    return run, arguments


def run_facts(run: RecordedRun, arguments: Any) -> dict[str, Any]:
    """Return the facts of a run, of its settings and of how its reward went."""
    estimator, language, rows = arguments.estimator, run.kind == "train", run.metrics
    steps, solved_at = [row for row in rows if row["step"] > 0], run.config.get("solved")
    facts = means("recent", last_tenth(steps), estimator.needs_groups) | {
        "solved_at": None if solved_at is None else float(solved_at),  # "Infinity" too
        "learning_rate": arguments.learning_rate,
        "has_entropy_bonus": estimator.entropy_coef > 0,
        "has_baseline": estimator.subtracts_baseline,
        "num_iterations": arguments.num_iterations,
        "beta": estimator.beta,
        "target_kl": getattr(arguments, "target_kl", None),
        "horizon": _horizon(arguments),
        "skipped": _skipped(run, arguments),
    }
    facts |= _progress_facts(run, arguments)
    evaluations = run.series("eval_reward_greedy" if language else "eval_reward")[1]
    solved = facts["solved_at"] is not None and bool(evaluations) and evaluations[-1] >= facts["solved_at"]
    facts |= {"is_solved": solved, "is_easy": solved or _is_easy(facts, language)}
    facts |= _noise_facts(run, arguments) | _advised(run, arguments, facts)
    if not language and (arguments.num_envs == 1 or estimator.within_rows):
        facts["recent_equal"] = None  # episodes are not compared, so that equal returns say nothing
    if not language and arguments.head != "softmax":
        facts["recent_entropy"] = None
    if language:
        facts |= {"max_completion_length": arguments.max_completion_length}
        facts |= (
            {} if facts["gained"] else latest_facts(rows, arguments.prompts_per_step, estimator.needs_groups)
        )
    return facts


def _advised(run: RecordedRun, arguments: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that rules advise, as facts."""
    language, estimator = run.kind == "train", arguments.estimator
    spread = run.series("reward_std")[1]
    early = fmean(spread[: max(1, len(spread) // 10)]) if spread else None
    scale = one_figure(1 / early) if early else getattr(arguments, "reward_scale", 1.0)
    step = "prompts_per_step" if language else "num_envs"
    more = "num_generations" if language and estimator.needs_groups else step
    several = arguments.num_generations > 1 if language else arguments.num_envs > 1
    baseline = {"estimator.baseline": "rloo" if language and several else "running_mean"}
    if not language and several:
        baseline = {"estimator.baseline": "timestep_mean", "estimator.returns": "reward_to_go"}
    samples, used = getattr(arguments, "max_samples", None), run.metrics[-1].get("num_samples") or 0
    whole = {"max_samples": 2 * samples} if samples else {"max_steps": 2 * arguments.max_steps}
    is_whole = used >= samples if samples else run.metrics[-1]["step"] >= arguments.max_steps
    advised: dict[str, Any] = {
        "entropy_bonus": 0.01,
        "more_samples": {more: 2 * getattr(arguments, more)},
        "more_rows": {step: 2 * getattr(arguments, step)},
        "some_baseline": baseline,
        "longer": whole if is_whole else {},  # a run that was stopped needs its own rest
        "remedy": "A warm start (--warm-start, or tokenrl sft) or a graded reward helps most."
        if language
        else "A shaped reward or a start nearer the goal helps most.",
    }
    if not language:
        if estimator.scale == "none":  # the bonus is in units of what the advantages are made of
            advised["entropy_bonus"] = one_figure(0.01 * (early or 1.0) * arguments.reward_scale)
        far = not 1 / 3 < scale / arguments.reward_scale < 3  # the critic's targets are far from size 1
        rate = {"value_learning_rate": 2 * (arguments.value_learning_rate or arguments.learning_rate)}
        advised["better_critic"] = {"reward_scale": scale} if far else rate
    return advised


def _is_easy(facts: Mapping[str, Any], language: bool) -> bool:
    """Whether the training reward reaches the threshold or, without one, looks like a success rate near 1."""
    reward = facts["recent_reward"]
    if facts["solved_at"] is not None:
        return bool(reward >= facts["solved_at"])
    return language and 0.95 <= reward <= 1


def _progress_facts(run: RecordedRun, arguments: Any) -> dict[str, Any]:
    """Return whether the reward has gained or fallen by more than chance, and what it was at its best."""
    parts, evaluated = quarters(run), evaluations(run)
    compared = evaluated if len(evaluated) > 1 else parts
    start, now, peak = compared[0], compared[-1], max(compared, key=lambda mean: mean.value)
    facts: dict[str, Any] = {"now_reward": now.value, "peak_reward": peak.value, "peak_step": peak.step}
    count, step = len(compared) - 1, run.metrics[-1]["step"]
    facts |= {"gained": _differs(now, start, count) > 0, "fell": _differs(now, peak, count) < 0}
    rising = len(parts) > 1 and _differs(parts[-1], parts[-2], 1) > 0
    facts["rising"] = rising and facts["gained"] and not is_running(run)
    facts["is_early"] = count == 0 or (is_running(run) and 2 * step < arguments.max_steps)
    kl = [value for at, value in zip(*run.series("kl"), strict=True) if at <= peak.step]
    facts["peak_kl"] = kl[-1] if kl else None
    return facts


def evaluations(run: RecordedRun) -> list[Mean]:
    """Return the evaluations that have a standard error, of sampled rewards or else of greedy ones."""
    for name in ("reward", "reward_greedy"):
        rows = [row for row in run.evaluations if row.get(name) is not None]
        if rows and all(row.get(f"{name}_stderr") is not None for row in rows):
            return [Mean(row[name], row[f"{name}_stderr"], row["step"]) for row in rows]
    return []


def quarters(run: RecordedRun) -> list[Mean]:
    """Return the mean training reward of each quarter of the steps; of fewer parts if there are few steps."""
    steps, values = run.series("reward")
    parts = max(1, min(4, len(values) // LEAST_STEPS))
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    out = []
    for first, last in pairwise(edges):
        part = values[first:last]
        error = stdev(part) / math.sqrt(len(part)) if len(part) > 1 else math.nan
        out.append(Mean(fmean(part), error, steps[last - 1]))
    return out


def _differs(one: Mean, other: Mean, comparisons: int) -> int:
    """Return 1 if `one` is larger than `other` by more than chance, -1 if smaller, else 0."""
    sure = NormalDist().inv_cdf(1 - FALSE_ALARMS / 2 / max(1, comparisons))
    bound, difference = sure * math.hypot(one.error, other.error), one.value - other.value
    return 0 if math.isnan(bound) or abs(difference) <= bound else 1 if difference > 0 else -1


def _noise_facts(run: RecordedRun, arguments: Any) -> dict[str, Any]:
    """Return the mean signal-to-noise ratio of an update with its standard error, where it was measured."""
    values = run.series("gradient/snr")[1]
    if len(values) < 2:
        return {}
    return {"snr": fmean(values), "snr_stderr": stdev(values) / math.sqrt(len(values))}


def _skipped(run: RecordedRun, arguments: Any) -> float | None:
    """Return the share of updates that were skipped, because their gradient was not finite."""
    counts = run.series("skipped_steps")[1]
    updates = run.metrics[-1]["step"] * arguments.num_iterations * arguments.num_minibatches
    return counts[-1] / updates if counts else None


def _horizon(arguments: Any) -> int | None:
    """Return the most actions of an episode; None where the environment is not installed here."""
    if isinstance(arguments, TrainArguments):
        return arguments.max_completion_length
    if arguments.max_episode_steps:
        return int(arguments.max_episode_steps)
    from tokenrl.control.environments import describe

    try:
        return describe(arguments.env).horizon
    except Refused:
        return None


def together(findings: Iterable[Finding]) -> dict[str, Any]:
    """Collect the changes of all findings; of two for one setting, that of the first grave finding counts.

    Where a policy is lost, its settings may be right but for what lost it. A reward that does not rise asks
    for a higher rate only if nothing else explains it.
    """
    found = sorted(findings, key=lambda finding: ("void", "act", "watch").index(finding.weight))  # stable
    lost = [finding for finding in found if finding.flag == "policy-destroyed"]
    grave = [finding for finding in found if finding.weight != "watch" and finding.flag != "reward-flat"]
    changes: dict[str, Any] = {}
    for finding in lost or [f for f in found if f.flag != "reward-flat" or not grave]:
        changes = dict(finding.changes) | changes
    return changes


def is_running(run: RecordedRun) -> bool:
    """Whether the run has no summary and a process still holds the lock of its directory."""
    if run.summary or not (run.path / ".lock").exists():
        return False
    try:
        with FileLock(run.path / ".lock", blocking=False):
            return False
    except (Timeout, OSError):
        return True


def _shown(run: RecordedRun, arguments: Any, facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts that the advice shows, as texts."""
    step, whole = run.metrics[-1]["step"], arguments.max_steps
    status = f"{step} of {whole} steps ({step / whole:.0%}); "
    if run.summary:
        error = f": {run.summary['error']}" if "error" in run.summary else ""
        status += f"ended ({run.summary.get('exit_reason', 'unknown')}){error}"
    elif is_running(run):
        status += "still running, there is no summary.json yet"
    else:
        status += "there is no summary.json and nobody holds the run's lock: it was killed"
    solved_at = facts["solved_at"]
    reached = "" if solved_at is None else f", {'' if facts['is_solved'] else 'not '}reached"
    last = {name: facts.get(f"recent_{name}") for name in ("entropy", "equal", "cut", "kl", "grad_norm")}
    return {
        "run": run.title,
        "status": status,
        "solved at": ("no threshold" if solved_at is None else f"{solved_at:g}") + reached,
        "reward": f"{facts['now_reward']:.3g} now, at its best {facts['peak_reward']:.3g} (step "
        f"{facts['peak_step']})",
        "last tenth": ", ".join(f"{name} {value:.3g}" for name, value in last.items() if value is not None),
    }


def _unused(run: Path) -> Path:
    """Return the name of a directory beside the run that does not exist yet: run-2, run-3 and so on."""
    number, place = 2, run.resolve() if run.name in ("", "..") else run
    while (found := place.with_name(f"{run.resolve().name}-{number}")).exists():
        number += 1
    return found
