"""Says which arms of a comparison are not valid, and why: their scores then give no verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from tokenrl.core.estimator import Estimator
from tokenrl.lab.compare.records import RunRecord
from tokenrl.runs.rules import LEAST_ENTROPY
from tokenrl.settings import arguments

HALF = 0.5
NAMED = 3
"""Runs that failed of which the reason is given."""


def void_reason(records: Sequence[RunRecord]) -> str:
    """Return why an arm on a problem is not valid, in words; empty if it is.

    Args:
        records: all its runs of the comparison.
    """
    return " ".join(reason for _, reason in gates(records) if reason)


def gates(records: Sequence[RunRecord]) -> list[tuple[str, str]]:
    """Return each gate by name, with the reason why the arm does not pass it; empty if it does.

    Args:
        records: all runs of an arm on a problem.
    """
    return [
        ("all runs finished", _failures(records)),
        ("completions end", _truncated(records)),
        ("signal at the start", _no_signal(records)),
        ("entropy at the start", _collapsed(records)),
    ]


def _failures(records: Sequence[RunRecord]) -> str:
    failed = [record for record in records if record.state != "finished"]
    if not failed:
        return ""
    each = " ".join(f"Seed {record.run.seed}: {record.reason}" for record in failed[:NAMED])
    more = len(failed) - NAMED
    rest = (
        "" if more <= 0 else f" And {more} more: seeds {', '.join(str(r.run.seed) for r in failed[NAMED:])}."
    )
    return (
        f"{len(failed)} of {len(records)} runs did not finish; each counts with the score that it had at its "
        f"end. {each}{rest}"
    )


def _truncated(records: Sequence[RunRecord]) -> str:
    share = _mean(records, "clipped_ratio")
    if not share > HALF:
        return ""
    return (
        f"{share:.0%} of the completions were cut off at the maximum length, so most of what was scored is "
        "unfinished. Raise --max-completion-length."
    )


def _no_signal(records: Sequence[RunRecord]) -> str:
    """Tell if an estimator that compares within groups found most groups with equal rewards at the start."""
    share = _mean(records, "frac_reward_zero_std_start")
    if not share > HALF or not _estimator(records).needs_groups:
        return ""
    return (
        f"In {share:.0%} of the groups of the first tenth of the steps all rewards were equal, so most of "
        "the samples taught this arm nothing. Give an easier or harder task, a warm start, or larger groups."
    )


def _collapsed(records: Sequence[RunRecord]) -> str:
    """Tell if an arm hardly explored at the start, and learnt nothing either.

    A low entropy alone is no fault: in a task whose prompts have one right answer it falls while the policy
    learns, and a model that was trained for the task starts with little of it.
    """
    entropy = _mean(records, "entropy_start")
    if _estimator(records).entropy_coef > 0 or not entropy < LEAST_ENTROPY:
        return ""
    curves = [[x for x in record.curves.get("reward", ()) if math.isfinite(x)] for record in records]
    gains = [curve[-1] - curve[0] for curve in curves if curve]
    if not gains or (gain := fmean(gains)) > 0:
        return ""
    return (
        f"In the first tenth of the steps the entropy was {entropy:.3g} nats per action (below "
        f"{LEAST_ENTROPY:g}), and the reward ended no higher than before training ({gain:+.2g}): the policy "
        "hardly explored. Lower the learning rate, or set --estimator.entropy-coef."
    )


def _estimator(records: Sequence[RunRecord]) -> Estimator:
    return arguments(Estimator, records[0].run.settings.get("estimator", {}))


def _mean(records: Sequence[RunRecord], name: str) -> float:
    known = [record.training[name] for record in records if name in record.training]
    return fmean(known) if known else math.nan
