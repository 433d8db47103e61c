"""Finds arms whose gradients differ only by a constant factor, which Adam and clipping cancel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from tokenrl.core.estimator import Estimator
from tokenrl.lab.compare.records import Arm, Problem
from tokenrl.runs.files import plain
from tokenrl.settings import arguments

KL = ("beta", "kl_estimator", "kl_placement")
ENTROPY = ("entropy_coef", "entropy_form")
RATIO = ("ratio", "epsilon", "epsilon_high", "dual_clip")
SCALE = ("scale_ddof", "scale_eps")


def same_up_to_a_factor(problem: Problem, arms: Sequence[Arm]) -> Iterator[tuple[Arm, Arm]]:
    """Yield pairs of arms whose gradients on a problem differ only by one constant factor.

    Over a group of G completions, the advantages of `group_mean` are (G - 1) / G times those of `rloo`, if
    they come from the total rewards and no completion is left out; and the loss of `fixed_length` is that of
    `sequence_sum`, divided by the longest length that is allowed. With one update per rollout a clipped ratio
    is 1 and changes nothing.
    """
    for one, other in combinations(arms, 2):
        if _core(problem, one) is not None and _core(problem, one) == _core(problem, other):
            yield one, other


def _core(problem: Problem, arm: Arm) -> dict[str, Any] | None:
    """Return the settings of an arm without what is a mere factor or has no effect.

    None if there is a KL or entropy term, whose relative weight a factor of the advantages changes.
    """
    settings = {**problem.settings, **arm.settings}
    estimator = arguments(Estimator, settings.pop("estimator", {}))
    if estimator.beta or estimator.entropy_coef:
        return None
    axes = plain(vars(estimator))
    unused = [*KL, *ENTROPY]
    once = settings.get("num_iterations", 1) == settings.get("num_minibatches", 1) == 1
    if once and axes["ratio"] in ("none", "token"):
        unused += RATIO
    if axes["scale"] == "none":
        unused += SCALE
        if axes["returns"] == "total" and axes["truncations"] == "keep":
            axes = _renamed(axes, "baseline", {"group_mean": "rloo"})
    axes = _renamed(axes, "aggregation", {"fixed_length": "sequence_sum"})
    return {**settings, "estimator": {name: value for name, value in axes.items() if name not in unused}}


def _renamed(axes: Mapping[str, Any], axis: str, names: Mapping[str, str]) -> dict[str, Any]:
    value = axes[axis]
    return {**axes, axis: names.get(value, value)}
