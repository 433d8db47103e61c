"""Measures the KL to the reference during training, and holds it near a target if one is set.

The control has one number as its state: the KL's weight `beta` in `Learner.estimator`. The run's arguments
keep the weight that it started from. With beta 0 there is no reference, and nothing in this module is called.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenrl.core.losses import k1, k3, next_beta
from tokenrl.core.rows import zero_outside
from tokenrl.core.statistics import mean_and_error
from tokenrl.language.training.update import Learner


def completion_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Estimate the KL of whole completions to the reference, from one sample each, in nats.

    `kl` is the log-ratio summed over tokens (k1). `kl_k3` sums `ref/pi - 1 + log(pi/ref)` over tokens (k3;
    Schulman 2020, "Approximating KL divergence"). Given the tokens before, the mean of a summand over the
    next token is the KL of that token's distribution, so by the chain rule both sums are unbiased. k3 is
    never negative; its variance is far smaller than that of k1 near the reference, and larger far from it.

    Args:
        logprobs: log-probabilities of the policy that sampled, at the temperature of sampling [N, T].
        ref_logprobs: log-probabilities of the reference, at the same temperature [N, T].
        mask: True on actions [N, T]; elsewhere both tensors may hold anything.

    Returns:
        `kl` and `kl_k3`, each [N].
    """
    log_pi, log_ref = (zero_outside(x.double(), mask) for x in (logprobs, ref_logprobs))
    return {"kl": k1(log_pi, log_ref).sum(dim=1), "kl_k3": k3(log_pi, log_ref).sum(dim=1)}


def kl_metrics(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, group_size: int) -> dict[str, Tensor]:
    """Average both estimates of the KL over a step's completions, with standard errors over prompts.

    Args:
        logprobs: log-probabilities of the policy, as for `completion_kl` [N, T].
        ref_logprobs: log-probabilities of the reference [N, T].
        mask: True on actions [N, T].
        group_size: completions per prompt.

    Returns:
        `kl`, `kl_stderr`, `kl_k3` and `kl_k3_stderr`; without the errors if there is a single completion.
    """
    metrics = {}
    for name, values in completion_kl(logprobs, ref_logprobs, mask).items():
        metrics[name], error = mean_and_error(values, group_size)
        if not torch.isnan(error):
            metrics[name + "_stderr"] = error
    return metrics


def adapt_beta(learner: Learner, kl: float) -> float:
    """Set the weight of the KL for the next step from the KL measured in this step (see `next_beta`).

    Without a `target_kl` the weight stays as it is. Every process measures the same KL, so all processes
    arrive at the same weight.

    Returns:
        The weight that this step used.
    """
    used, args = learner.estimator.beta, learner.args
    if args.target_kl is not None:
        beta = next_beta(used, kl, target=args.target_kl, gain=args.kl_gain)
        learner.estimator = replace(learner.estimator, beta=beta)
    return used
