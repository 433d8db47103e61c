"""Says in words what the numbers of a comparison do and do not show; each sentence only where they say so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from scipy import stats

from tokenrl.lab.compare.factors import same_up_to_a_factor
from tokenrl.lab.compare.records import Plan, Problem, RunRecord
from tokenrl.lab.compare.results import due_places
from tokenrl.lab.compare.scores import at_places
from tokenrl.lab.compare.statistics.found import Difference, Interval
from tokenrl.lab.compare.statistics.paired import LEAST_PAIRS, interval
from tokenrl.lab.compare.statistics.words import listed, shown

if TYPE_CHECKING:
    from tokenrl.lab.compare.comparison import Comparison

MOST = 0.5
"""From this share of clipped updates on, clipping sets the size of most steps."""
A_LOT = {"skipped": 0.05, "idle": 0.25}
"""Shares of the updates from which on it is said that they were skipped, or had no gradient."""
SIGNIFICANT = 0.05

Runs = Mapping[str, Sequence[RunRecord]]
"""The runs of the comparison on one problem, by arm."""


def findings(found: Comparison, problem: Problem) -> tuple[str, ...]:
    """Return sentences about what the numbers on one problem do and do not say.

    Args:
        found: the comparison; its `findings` may still be empty.
        problem: the problem.
    """
    runs = {arm.label: found.runs(problem.label, arm.label) for arm in found.plan.arms}
    return (
        *_exploratory(found.plan),
        *_without_score(found, problem, runs),
        *_ceiling(found, problem, runs),
        *_sharpness(found, problem),
        *_clipping(runs),
        *_factors(found, problem, runs),
        *_edges(found, problem),
        *_without_update(runs),
        *_few_pairs(found, problem),
    )


def _exploratory(plan: Plan) -> Iterator[str]:
    """Tell what was decided after results could be seen; then the level of the intervals does not hold."""
    late = [arm.label for arm in plan.arms if arm.exploratory]
    changes = plan.changes or (late and [f"{listed(late)} came in after runs had begun"])
    if changes:
        yield (
            f"Exploratory: {'; '.join(changes)}. Who sees results before choosing what to compare, or when "
            "to stop, finds differences by chance more often than the level says. Repeat the comparison with "
            "new seeds (--first-seed) in another --output-dir."
        )


def _without_score(found: Comparison, problem: Problem, runs: Runs) -> Iterator[str]:
    """Tell of arms that could not be compared at all, because no run of theirs was evaluated."""
    families = [family for family in found.judgement.families if family.problem == problem.label]
    compared = {arm.arm for family in families for arm in family.arms}
    for arm, records in runs.items():
        if arm not in compared:
            reason = next((r.reason for r in records if r.reason), "")
            yield f"Without a score: no run of {arm} has the score {found.plan.metric}. {reason}"


def _ceiling(found: Comparison, problem: Problem, runs: Runs) -> Iterator[str]:
    """Tell if all arms end at the best possible reward, and at which budget they lie farthest apart."""
    ends = [_mean(r.scores.get("reward") for r in records) for records in runs.values()]
    margin = found.plan.margins.get(problem.label)
    best = problem.reward_range[1] if problem.reward_range else None
    if None in ends:
        return
    low = min(end for end in ends if end is not None)
    if best is not None and margin is not None and best - low <= margin:
        where = f"within {shown(margin)} of the best possible reward, {shown(best)}"
    elif problem.solved is not None and low >= problem.solved:
        where = f"at {shown(low)} or above, and {shown(problem.solved)} counts as solved"
    else:
        return
    text = f"Ceiling: every arm ends {where}, so the reward at the end hardly separates them."
    place = _farthest_apart(runs, due_places(problem))
    if place is not None:
        text += (
            f" Compare at a smaller budget: after {place:,.0f} {problem.unit} the arms lay farthest apart, "
            f"relative to the spread over seeds ({_budget(problem, place)}; since these results suggest it, "
            "with other seeds)."
        )
    yield text


def _budget(problem: Problem, samples: float) -> str:
    """Return the flag of a budget of so many samples."""
    if problem.kind == "train":
        return f"--max-samples {samples:.0f}"
    return f"--max-steps {max(1, round(samples * problem.settings['max_steps'] / problem.budget))}"


def _farthest_apart(runs: Runs, places: Sequence[float]) -> float | None:
    """Return the samples at which the arms' curves differ most relative to what seeds leave unexplained.

    It is the place with the greatest F of the analysis of variance with the arms as treatments and the seeds
    as blocks; None if that is the last place, or if the arms do not differ at the level .05 over all places.
    """
    by_seed = [{r.run.seed: r for r in records if "reward" in r.scores} for records in runs.values()]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    if len(by_seed) < 2 or len(seeds) < 2 or len(places) < 2:
        return None
    table = [[at_places(places, r[s].samples, r[s].curves["reward"]) for s in seeds] for r in by_seed]
    x = np.array(table)  # [arms, seeds, places]
    arms, rows = x.mean(axis=1, keepdims=True), x.mean(axis=0, keepdims=True)
    middle = x.mean(axis=(0, 1), keepdims=True)
    between = ((arms - middle) ** 2).mean(axis=(0, 1))
    within = ((x - arms - rows + middle) ** 2).mean(axis=(0, 1))
    free = len(seeds) - 1
    ratio = free * between / np.maximum(within, 1e-12)
    least = stats.f.isf(SIGNIFICANT / len(places), len(by_seed) - 1, (len(by_seed) - 1) * free)
    place = int(ratio.argmax())
    return places[place] if place < len(places) - 1 and ratio[place] > least else None


def _sharpness(found: Comparison, problem: Problem) -> Iterator[str]:
    """Tell if an arm differs in sampled reward but not in greedy reward, and the better one is sharper."""
    if found.plan.metric not in ("area", "reward"):
        return
    entropies = _differences(found, "entropy", problem)
    for arm, entropy in entropies.items():
        for metric, when in (("area", "over the budget"), ("reward", "at the end")):
            sampled = _differences(found, metric, problem).get(arm)
            greedy = _differences(found, f"{metric}_greedy", problem).get(arm)
            if sampled and greedy and _sharper(sampled, greedy, entropy):
                yield _sharpness_in_words(found, problem, when, sampled, greedy)
                break


def _sharper(sampled: Difference, greedy: Difference, entropy: Difference) -> bool:
    gain, other, sharp = sampled.mean.value, greedy.mean, entropy.mean
    return (
        _excludes_0(sampled.adjusted)
        and not _excludes_0(other)
        and abs(other.value) < abs(gain) / 2
        and _excludes_0(sharp)
        and sharp.value * gain < 0
    )


def _sharpness_in_words(
    found: Comparison, problem: Problem, when: str, sampled: Difference, greedy: Difference
) -> str:
    better, other = sampled.arm, sampled.reference
    sign = 1 if sampled.mean.value > 0 else -1
    if sign < 0:
        better, other = other, better
    nats = [_mean(r.scores.get("entropy") for r in found.runs(problem.label, arm)) for arm in (better, other)]
    low, high = sorted((sign * greedy.mean.low, sign * greedy.mean.high))
    return (
        f"Sharpness: {when} {better} has a sampled reward that is "
        f"{shown(abs(sampled.mean.value))} higher than that of {other}, but no difference is seen in their "
        f"greedy rewards ({sign * greedy.mean.value:+.2g} [{shown(low)}, {shown(high)}]), and {better} has "
        f"the lower entropy ({shown(nats[0])} against {shown(nats[1])} nats). A sharper policy "
        "alone raises the sampled reward, so this need not mean that it knows more."
    )


def _clipping(runs: Runs) -> Iterator[str]:
    """Tell for which share of the updates the gradient was clipped, if that was the case for most."""
    means = {arm: _mean(r.training.get("grad_clipped") for r in records) for arm, records in runs.items()}
    shares = {arm: share for arm, share in means.items() if share is not None}
    most = [arm for arm, share in shares.items() if share > MOST]
    if not most:
        return
    each = ", ".join(f"{arm} {share:.0%}" for arm, share in shares.items())
    text = (
        f"Clipping: the gradient was clipped in most updates of {listed(most)} (share of the updates: "
        f"{each}). There the bound sets the size of a step, and the estimator only its direction."
    )
    if len(most) < len(shares):
        text += " The arms thus do not take comparable steps."
    yield text


def _factors(found: Comparison, problem: Problem, runs: Runs) -> Iterator[str]:
    """Tell of arms that differ by a factor only, which the optimiser cancels, if they come out alike."""
    for one, other in same_up_to_a_factor(problem, found.plan.arms):
        optimizer = {**problem.settings, **one.settings}.get("optimizer", "adamw")
        rates = {found.rates.get((problem.label, arm.label)) for arm in (one, other)}
        apart = _apart(runs, one.label, other.label, found.plan.metric)
        if optimizer != "adamw" or len(rates) > 1 or apart is None or _excludes_0(apart):
            continue
        name = "AdamW" if problem.kind == "train" else "Adam"
        text = (
            f"Optimiser: the gradients of {one.label} and {other.label} differ only by a constant factor, "
            f"and {name} divides by the size of the gradient, so they come out alike, as they must. That "
            "says nothing about the factor."
        )
        if problem.kind == "train":
            text += " It shows itself with --optimizer sgd --max-grad-norm 0."
        yield text


def _edges(found: Comparison, problem: Problem) -> Iterator[str]:
    """Tell of tuned learning rates that are the least or the greatest of those that were tried."""
    for arm in found.plan.arms:
        key = (problem.label, arm.label)
        tried, rate = found.sensitivity.get(key, {}), found.rates.get(key)
        if len(tried) > 1 and rate in (min(tried), max(tried)):
            side = "least" if rate == min(tried) else "greatest"
            yield (
                f"Learning rate: the best one of {arm.label}, {rate:g}, is the {side} that was tried, so a "
                "better one may lie beyond it."
            )


def _without_update(runs: Runs) -> Iterator[str]:
    """Tell of arms of which many updates were skipped, or left the weights alone."""
    reasons = {
        "skipped": "were skipped because the gradient was not finite",
        "idle": "left the weights alone, because no completion had a gradient",
    }
    for arm, records in runs.items():
        for name, reason in reasons.items():
            share = _mean(r.training.get(name) for r in records)
            if share is not None and share >= A_LOT[name]:
                yield f"Updates: {share:.0%} of the updates of {arm} {reason}."


def _few_pairs(found: Comparison, problem: Problem) -> Iterator[str]:
    """Tell if the sign-flip test cannot reach a small p, however clear the difference is."""
    differences = list(_differences(found, found.plan.metric, problem).values())
    if not differences:
        return
    pairs, comparisons = min(len(d.differences) for d in differences), len(found.plan.arms) - 1
    least = max(d.p_least for d in differences)
    if least * comparisons <= SIGNIFICANT:
        return
    text = f"Few pairs: with {pairs} pairs the sign-flip test gives no p below {shown(least)}"
    if comparisons > 1:
        text += (
            f", and none below {shown(min(1.0, least * comparisons))} for the clearest of {comparisons} "
            "comparisons after Holm's adjustment"
        )
    ending = "there is no verdict" if pairs < LEAST_PAIRS else "the intervals decide, and not this p"
    yield f"{text}. So {ending}."


def _differences(found: Comparison, metric: str, problem: Problem) -> dict[str, Difference]:
    """Return the differences to the reference in a metric, by arm, without those of arms that are void."""
    judgements = {**found.beside, found.judgement.metric: found.judgement}
    void = {arm for (label, arm), verdict in found.judgement.verdicts().items()
            if label == problem.label and verdict == "void"}  # fmt: skip
    families = judgements[metric].families if metric in judgements else ()
    of_problem = [family for family in families if family.problem == problem.label]
    return {d.arm: d for family in of_problem for d in family.differences if d.arm not in void}


def _apart(runs: Runs, one: str, other: str, metric: str) -> Interval | None:
    """Return the mean paired difference of two arms with a 95 % interval; None below two pairs."""
    first, second = (
        {r.run.seed: r.scores[metric] for r in runs[arm] if metric in r.scores} for arm in (one, other)
    )
    apart = [first[seed] - second[seed] for seed in first.keys() & second.keys()]
    return interval(np.array(apart)) if len(apart) > 1 else None


def _excludes_0(ends: Interval) -> bool:
    return ends.low > 0 or ends.high < 0


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
