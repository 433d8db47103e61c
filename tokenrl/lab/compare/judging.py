"""Judges the records of a comparison: verdicts, what stands beside them, and what they do not say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from tokenrl.errors import Stopped
from tokenrl.lab.compare.checkpoints import noise_of_runs
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.gates import void_reason
from tokenrl.lab.compare.records import Plan, Problem, RunRecord, runs_of_arm
from tokenrl.lab.compare.sentences import findings
from tokenrl.lab.compare.statistics.found import Judgement
from tokenrl.lab.compare.statistics.judge import judge_scores
from tokenrl.lab.compare.statistics.overall import Overall, overall
from tokenrl.lab.compare.statistics.survival import Curve, ToThreshold, default_threshold, to_threshold
from tokenrl.lab.compare.tuning import Sensitivity
from tokenrl.runs.directory import versions

BESIDE = ("area", "reward", "area_greedy", "reward_greedy", "entropy")
"""Scores that are shown beside the one that decides."""


def judged(
    output_dir: Path,
    plan: Plan,
    records: Sequence[RunRecord],
    rates: dict[tuple[str, str], float],
    sensitivity: Sensitivity,
    announce: Callable[[str], None],
) -> Comparison:
    """Judge the runs of a comparison.

    Args:
        output_dir: its directory.
        plan: the plan.
        records: what was read from the runs, of all roles.
        rates: the learning rates that were tuned, by problem and arm.
        sensitivity: scores by learning rate on the tuning seeds.
        announce: prints a line for people, since measuring the noise takes a while.

    Raises:
        Stopped: on a problem no arm has a score on a seed of the reference.
    """
    places = list(product(plan.problems, plan.arms))
    of = {(p.label, a.label): runs_of_arm(records, p.label, a.label) for p, a in places}
    _check_scores(plan, of)
    void = {key: reason for key, runs in of.items() if (reason := void_reason(runs))}
    judgement = _judge(plan, records, of, plan.metric, void)
    others = [name for name in BESIDE if name != plan.metric and _everywhere(plan, of, name)]
    beside = {name: _judge(plan, records, of, name) for name in others}
    usual = {(p.label, a.label): float(a.settings.get("learning_rate", p.learning_rate)) for p, a in places}
    found = Comparison(
        output_dir=output_dir,
        plan=plan,
        records=tuple(records),
        judgement=judgement,
        beside=beside,
        findings={},
        to_threshold={problem.label: _to_threshold(plan, problem, of) for problem in plan.problems},
        rates={**usual, **rates},
        sensitivity=sensitivity,
        noise=noise_of_runs(plan, of, output_dir, announce) if plan.noise else (),
        overall=_overall(plan, of),
        versions=versions(),
        wall_seconds=0.0,
    )
    return replace(found, findings={p.label: findings(found, p) for p in plan.problems})


Runs = Mapping[tuple[str, str], Sequence[RunRecord]]
"""The records of the comparison's own runs by problem and arm."""


def _comparable(plan: Plan, of: Runs, metric: str) -> set[tuple[str, str]]:
    """Return the arms by problem that have a score on a seed of the reference, and if any has, that."""
    seeds = {key: {r.run.seed for r in runs if metric in r.scores} for key, runs in of.items()}
    arms = [key for key in of if key[1] != plan.reference and seeds[key] & seeds[key[0], plan.reference]]
    return {*arms, *((problem, plan.reference) for problem, _ in arms)}


def _everywhere(plan: Plan, of: Runs, metric: str) -> bool:
    return {problem for problem, _ in _comparable(plan, of, metric)} == {p.label for p in plan.problems}


def _check_scores(plan: Plan, of: Runs) -> None:
    """Stop if on a problem no arm shares a seed with the reference, so that nothing can be judged."""
    comparable = {problem for problem, _ in _comparable(plan, of, plan.metric)}
    for problem in (p.label for p in plan.problems):
        if problem in comparable:
            continue
        runs = [r for arm in plan.arms for r in of[problem, arm.label] if plan.metric not in r.scores]
        failed = [f"{r.run.arm}, seed {r.run.seed}: {r.reason}" for r in runs if r.reason]
        mend = (
            f"{failed[0]} Mend that, and give the same command again, which keeps the other runs."
            if failed
            else "Its runs do not measure that; give another --metric."
        )
        raise Stopped(
            f"Nothing can be judged on {problem}: no arm has the score {plan.metric} on a seed on which the "
            f"reference {plan.reference} has it. {mend}"
        )


def _judge(
    plan: Plan,
    records: Sequence[RunRecord],
    of: Runs,
    metric: str,
    void: Mapping[tuple[str, str], str] | None = None,
) -> Judgement:
    """Judge one metric; only the one that decides has a margin and arms that are not valid."""
    decides, comparable = void is not None, _comparable(plan, of, metric)
    rows = [
        (arm, r.run.seed, r.scores[metric], problem)
        for (problem, arm), runs in of.items()
        for r in runs
        if (problem, arm) in comparable and metric in r.scores
    ]
    itself: dict[str, dict[int, float]] = {}
    for record in records:
        if record.run.role == "itself" and metric in record.scores:
            itself.setdefault(record.run.problem, {})[record.run.seed] = record.scores[metric]
    return judge_scores(
        rows,
        metric=metric,
        reference=plan.reference,
        margin=plan.margins if decides else None,
        void=void,
        itself=itself,
    )


def _to_threshold(plan: Plan, problem: Problem, of: Runs) -> tuple[ToThreshold, ...]:
    """Measure the way to the reward that counts as solved, else to half of what the best arm gains."""
    curves = {
        arm.label: {
            r.run.seed: Curve(r.samples, r.seconds, r.curves["reward"])
            if "reward" in r.curves
            else Curve((), (), ())
            for r in of[problem.label, arm.label]
        }
        for arm in plan.arms
    }
    threshold = default_threshold(curves) if problem.solved is None else problem.solved
    if threshold is None:
        return ()
    budget = max(
        [problem.budget, *(c.samples[-1] for runs in curves.values() for c in runs.values() if c.samples)]
    )
    return to_threshold(curves, threshold, budget)


def _overall(plan: Plan, of: Runs) -> Overall | None:
    ranges = {p.label: p.reward_range for p in plan.problems if p.reward_range is not None}
    if len(plan.problems) < 2 or len(ranges) < len(plan.problems):
        return None
    scores = {
        p.label: {
            a.label: {
                r.run.seed: r.scores[plan.metric] for r in of[p.label, a.label] if plan.metric in r.scores
            }
            for a in plan.arms
        }
        for p in plan.problems
    }
    complete = all(runs for arms in scores.values() for runs in arms.values())
    return overall(scores, ranges) if complete else None
