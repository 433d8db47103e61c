"""Chooses the baseline of an agent that learns from whole episodes without a critic, by measured noise.

The noise is that of the untrained policy, and learning changes it in two ways that cannot be measured before
training. Returns grow, and a gradient without a baseline grows noisier with the square of their size. And
episodes become longer or shorter, so that one number for all steps no longer fits each of them. Both changes
are large where a known reward threshold is far from the returns that were measured, compared with their
spread. There the simpler choices are ruled out, whatever their noise is now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenrl.advisor.environment_reasons import Returns
from tokenrl.advisor.noise import Noise
from tokenrl.advisor.rules import CLOSE
from tokenrl.control.environments import Spec

NEAR = 1.0
"""No baseline at all needs a threshold of at most this size, in standard deviations of the returns."""
FAR = 10.0
"""One number for all steps needs a threshold at most so far from the mean, in the same unit."""


class Choice(NamedTuple):
    """A baseline: its name in `noise.NAMES`, the axes of the estimator, and the reason."""

    name: str
    axes: dict[str, Any]
    reason: str


def choose_baseline(spec: Spec, found: Returns, noises: Mapping[str, Noise]) -> Choice:
    """Choose the simplest baseline whose noise is close to the lowest of those that the rules leave.

    Where that is a running mean, the mean over the update does the same without lagging behind, so
    `token_whiten` is advised if it is no noisier. (On gridworld, with these settings, it learns faster.)

    Args:
        spec: the environment.
        found: the returns of the untrained policy.
        noises: what `measure_noise` returned.
    """
    ruled_out = unfit(spec, found)
    left = {name: noise for name, noise in noises.items() if name not in ruled_out}
    lowest = min(noise.ratio for noise in left.values())
    exact = [name for name in left if name != "whitened"]
    name = next(name for name in exact if left[name].ratio <= CLOSE * lowest or name == exact[-1])
    if name == "running_mean" and left["whitened"].ratio <= left[name].ratio:
        name = "whitened"
    reasons = [WHY[name].format(found.mean), measured(noises), *dict.fromkeys(ruled_out.values())]
    if name == "none":
        reasons.append("take running_mean if the mean return leaves 0")
    return Choice(name, axes(name, found), "; ".join(reasons))


WHY = {
    "none": "returns lie around 0, so that subtracting a mean would remove nothing",
    "whitened": "the scale below subtracts the mean over the update; exact with running_mean from {:.2g} on, "
    "which lags behind",
    "running_mean": "one mean of earlier returns suffices",
    "timestep_mean": "the mean of the other episodes at the same step needs no critic",
}


def unfit(spec: Spec, found: Returns) -> dict[str, str]:
    """Return the baselines that may not stay good while the policy learns, each with the reason."""
    spread = found.sd
    if spread == 0:
        return dict.fromkeys(("none", "whitened", "running_mean"), "equal returns leave nothing to compare")
    if spec.solved is None:
        if spec.horizon == 1:
            return {}
        why = "without a reward threshold nothing says whether returns stay of this size"
        return dict.fromkeys(("none", "whitened", "running_mean"), why)
    size, distance = abs(spec.solved) / spread, abs(spec.solved - found.mean) / spread
    if distance > FAR:
        why = f"the threshold is {distance:.0f} sd away: too far for one mean of all steps to stay good"
        return dict.fromkeys(("none", "whitened", "running_mean"), why)
    if size > NEAR:
        return {"none": f"none is ruled out, since returns will grow to {size:.1f} sd"}
    return {}


def axes(name: str, found: Returns) -> dict[str, Any]:
    """Return the axes of the estimator that a baseline of `noise.NAMES` stands for."""
    if name == "whitened":
        return {"baseline": "none", "scale": "token_whiten"}
    if name == "running_mean":  # it starts at the mean that was measured, which is of other episodes
        return {"baseline": name, "running_mean_init": float(f"{found.mean:.2g}")}
    return {"baseline": name}


def measured(noises: Mapping[str, Noise]) -> str:
    """Say how the noises compare."""
    return "gradient noise, lowest = 1: " + ", ".join(
        f"{name} {'> 1000' if noise.ratio > 1000 else format(noise.ratio, '.3g')}"
        for name, noise in noises.items()
    )
