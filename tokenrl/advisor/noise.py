"""Measures how noisy the policy gradient of an untrained agent is with each of some baselines.

The gradient sample of episode i with the baseline b is, with G_it the reward to go and pi the policy,

    g_i(b) = sum_t (G_it - b_it) grad log pi(a_it | s_it),

over all parameters of the policy, by autograd. Its noise is the trace of its covariance over the N episodes,
`1/(N - 1) sum_i |g_i - mean g|^2`. All baselines are measured on the same episodes, so that their ratios are
far more certain than each number.

What is subtracted comes from the estimator core, so it is what training subtracts: for `timestep_mean` the
mean of the other episodes at the step; for `running_mean`, which in training comes from earlier episodes, the
mean return of the other episodes; for `whitened` the mean over all steps of the update. Whitening
then divides by one number, which scales signal and noise alike and is left out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenrl.control.policies import Policy
from tokenrl.control.rollouts import Rollout
from tokenrl.core.estimator import Estimator

NAMES = ("none", "whitened", "running_mean", "timestep_mean")
"""The baselines that are measured, the simplest first."""


@dataclass(frozen=True)
class Noise:
    """The noise of the gradient of one episode with one baseline.

    Attributes:
        trace: trace of the covariance of the gradient of one episode, in squared units of the gradient.
        ratio: the trace divided by the lowest of all baselines; infinite if only the lowest is 0.
        stderr: standard error of the ratio over episodes; nan if it is not finite.
    """

    trace: float
    ratio: float
    stderr: float

    def __str__(self) -> str:
        if self.ratio > 1000:
            return "> 1000"
        exact = self.stderr < self.ratio / 1000
        return f"{self.ratio:.3g}" if exact else f"{self.ratio:.3g} +- {self.stderr:.1g}"


def measure_noise(policy: Policy, rollout: Rollout) -> dict[str, Noise]:
    """Measure the noise with each baseline of `NAMES`, on the same episodes.

    Args:
        policy: the policy that played the episodes.
        rollout: whole episodes, two or more.
    """
    squares = {name: _squares(found) for name, found in gradients(policy, rollout).items()}
    largest = max(float(x.mean()) for x in squares.values())
    # Rounding errors are no noise: a baseline that leaves none gives a number near 1e-14 of the others.
    squares = {name: x if float(x.mean()) > 1e-9 * largest else 0 * x for name, x in squares.items()}
    lowest = min(squares.values(), key=lambda x: float(x.mean()))
    return {name: _against(x, lowest) for name, x in squares.items()}


def gradients(policy: Policy, rollout: Rollout) -> dict[str, Tensor]:
    """Return the gradient sample of each of N episodes, float64 [N, D], by the name of the baseline."""
    known, mask = advantages(rollout), rollout.mask
    parameters = policy.policy_parameters()
    rows: dict[str, list[Tensor]] = {name: [] for name in known}
    for i, taken in enumerate(mask):
        logprobs = policy.score(rollout.observations[i][taken], rollout.actions[i][taken]).logprobs
        for name, each in known.items():
            objective = (each[i][taken] * logprobs).sum()
            parts = torch.autograd.grad(objective, parameters, retain_graph=True, materialize_grads=True)
            rows[name].append(torch.cat([part.flatten() for part in parts]).double())
    return {name: torch.stack(found) for name, found in rows.items()}


def advantages(rollout: Rollout) -> dict[str, Tensor]:
    """Return what each baseline of `NAMES` leaves of the reward to go, [N, T]."""
    rewards, mask = rollout.rewards, rollout.mask

    def left(baseline: str) -> Tensor:
        estimator = Estimator.preset("reinforce_timestep_mean", baseline=baseline)
        return estimator.advantages(rewards, mask, group_size=len(mask)).policy

    whole = left("none")
    return {
        "none": whole,
        "whitened": (whole - whole[mask].mean()) * mask,
        "running_mean": left("rloo"),  # in one group, the mean return of all other episodes
        "timestep_mean": left("timestep_mean"),
    }


def _squares(samples: Tensor) -> Tensor:
    """Return numbers [N] whose mean is the unbiased trace of the covariance of the samples [N, D]."""
    n = len(samples)
    return (samples - samples.mean(0)).square().sum(1) * n / (n - 1)


def _against(squares: Tensor, lowest: Tensor) -> Noise:
    trace, best = float(squares.mean()), float(lowest.mean())
    if best == 0:
        return Noise(trace, math.inf if trace else 1.0, math.nan if trace else 0.0)
    ratio = trace / best
    # The error of a ratio of two means over the same episodes, to first order.
    error = float((squares - ratio * lowest).std()) / math.sqrt(len(squares)) / best
    return Noise(trace, ratio, error)


def noise_facts(noises: Mapping[str, Noise]) -> dict[str, str]:
    """Return the line that the advice shows; none without a measurement."""
    if not noises:
        return {}
    each = ", ".join(f"{name} {noise}" for name, noise in noises.items())
    return {"gradient noise": f"of the untrained policy, in multiples of the lowest: {each}"}
