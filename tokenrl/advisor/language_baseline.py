"""Chooses the baseline of a language task from the spread of rewards, and says how rewards are normalised.

With the variance W of the rewards of one prompt, the variance B of the prompts' expected rewards and the mean
reward m, the mean square of `reward - baseline` is, for completions of the untrained policy,

    none               W + B + m^2
    running_mean       W + B
    rloo, groups of G  W G / (G - 1)

This is the noise of the gradient as far as the rewards make it, with score norms left aside.
"""

from __future__ import annotations

from dataclasses import replace

from tokenrl.advisor.rules import CLOSE, SMALLEST_GROUP
from tokenrl.core.choices import choice_of
from tokenrl.core.estimator import Estimator
from tokenrl.language.training.probe import Probe


def reward_noise(found: Probe, size: int) -> dict[str, float]:
    """Return the mean square of reward minus baseline, by baseline; `rloo` only for groups of two or more."""
    apart = found.within + found.between
    noise = {"none": apart + found.reward.value**2, "running_mean": apart}
    return noise | ({"rloo": found.within * size / (size - 1)} if size > 1 else {})


def with_baseline(estimator: Estimator, found: Probe, size: int, asked: str | None) -> tuple[Estimator, str]:
    """Choose the baseline, and give the reason.

    Groups are compared wherever they have four completions or more: while the policy learns, prompts come to
    differ in difficulty, which only a mean of the prompt's own rewards follows. Smaller groups make a noisy
    mean, and there the lower noise decides.

    Args:
        estimator: the estimator, with the baseline that was asked for, if any.
        found: the measurements.
        size: completions per prompt.
        asked: the baseline that was asked for; None to choose it.
    """
    noise = reward_noise(found, size)
    compared = " and ".join(f"{name} {value:.2g}" for name, value in noise.items())
    measured = f"mean square of reward minus baseline: {compared}"
    if noise["none"] <= CLOSE * noise["running_mean"]:
        measured += "; rewards lie around 0, so none would do no harm before training"
    if asked is not None:
        plain = "plain REINFORCE; " if asked == "none" else ""
        return estimator, f"as you asked; {plain}{measured}"
    lonely = size == 1
    if lonely or (size < SMALLEST_GROUP and noise["running_mean"] < noise["rloo"]):
        start = float(f"{found.reward.value:.2g}")
        chosen = replace(estimator, baseline="running_mean", running_mean_init=start)
        why = "one completion per prompt leaves none to compare it with" if lonely else "groups are small"
        return chosen, f"{why}: the mean of earlier rewards, from the measured {start:g} on; {measured}"
    why = "mean of the prompt's other rewards; with one completion per prompt, take running_mean"
    return replace(estimator, baseline="rloo"), f"{why}; {measured}"


def bias_in_words(estimator: Estimator) -> str:
    """Return the bias of an estimator in words; an entropy bonus changes the objective, not the bias."""
    return replace(estimator, entropy_coef=0.0).bias_status.replace("_", " ")


def why_scale() -> str:
    """Say why rewards are not divided, and what the divisors do to the expected gradient."""
    words = {
        name: choice_of("scale", name).status.replace("_", " ")
        for name in ("group_std", "loo_std", "batch_std", "token_whiten")
    }
    others = ", ".join(f"{name} is {status}" for name, status in words.items())
    return f"no division, exact: the group's std would give easy and hard prompts more weight; {others}"
