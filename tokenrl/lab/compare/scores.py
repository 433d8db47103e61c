"""Defines the scores by which arms are compared, and computes them from the evaluations of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Literal, NamedTuple

import numpy as np


class Score(NamedTuple):
    """A score in words, and whether a greater one is better; for some neither is."""

    words: str
    better: Literal["higher", "neither"]


SCORES = {
    "area": Score("mean held-out sampled reward over the evaluations of the budget", "higher"),
    "reward": Score("held-out sampled reward at the end", "higher"),
    "area_greedy": Score("mean held-out greedy reward over the evaluations of the budget", "higher"),
    "reward_greedy": Score("held-out greedy reward at the end", "higher"),
    "entropy": Score("entropy in the last tenth of the steps, nats per action (token)", "neither"),
    "kl": Score("KL to the reference policy in the last tenth of the steps, nats per completion", "neither"),
}
"""All scores; in control the rewards are returns of episodes, and greedy means the most probable actions."""


def scores_of(
    samples: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    training: Mapping[str, float],
    places: Sequence[float],
) -> dict[str, float]:
    """Return the scores of a run, as far as it has the numbers for them.

    Arms are evaluated after nearly, but not always exactly, the same numbers of samples: a step of ReMax, for
    example, has more of them. An area is therefore the mean of the curve at the same places for all arms,
    interpolated linearly between two evaluations. Where a run was evaluated at these places, it is the plain
    mean of the evaluations. After the last evaluation the curve stays as it is.

    Args:
        samples: samples generated up to each evaluation.
        curves: metrics of each evaluation, by name.
        training: means over training steps, by name.
        places: samples at which all arms are compared, without that before training.
    """
    found = {}
    for name, suffix in (("reward", ""), ("reward_greedy", "_greedy")):
        values = [value for value in curves.get(name, ()) if math.isfinite(value)]
        if values:
            found[f"area{suffix}"] = fmean(at_places(places, samples, curves[name]))
            found[f"reward{suffix}"] = values[-1]
    found |= {name: training[name] for name in ("entropy", "kl") if name in training}
    return {name: found[name] for name in SCORES if name in found}


def at_places(places: Sequence[float], samples: Sequence[float], curve: Sequence[float]) -> list[float]:
    """Return a curve at some places, interpolated linearly between the evaluations with a finite value.

    Args:
        places: where it is wanted, in samples.
        samples: samples generated up to each evaluation.
        curve: a metric of each evaluation; one value at least is finite.
    """
    known = [(x, y) for x, y in zip(samples, curve, strict=True) if math.isfinite(y)]
    at, values = zip(*known, strict=True)
    found: list[float] = np.interp(places, at, values).tolist()
    return found
