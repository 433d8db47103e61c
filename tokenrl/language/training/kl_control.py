"""The KL to the reference during training: measured with its error, and held near a target if one is set.

The state of the control is one number, the weight in `Learner.estimator`; a run's arguments keep the weight
that it started from. Without a KL (beta 0) there is no reference, and nothing here is called.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tokenrl.core.kl import k1, k3, next_beta
from tokenrl.core.masking import zero_outside
from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Refused
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.update import Learner


def check_target(args: TrainSettings) -> None:
    """Refuse a target that nothing can be done about.

    Raises:
        Refused: a target without a KL whose weight could change.
    """
    if args.target_kl is not None and not args.estimator.needs_kl:
        raise Refused(
            f"target_kl={args.target_kl:g} asks for a KL held near it, but the estimator has beta 0: there "
            "is no reference to measure it to, and 0 times anything stays 0. Set --estimator.beta to the "
            "weight to start from (0.05 is a start), or leave target_kl out."
        )


def completion_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Two estimates [N] of the KL of whole completions from one sample each, in nats.

    `kl` sums the log ratio over the tokens (k1); `kl_k3` sums `ref/pi - 1 + log pi/ref`, whose mean over the
    next token is the KL there, whatever came before, so that by the chain rule the sum has the KL as its
    mean too. It is never negative; near the reference it varies far less than k1, far from it more.

    Args:
        logprobs: of the policy that sampled, at the temperature of sampling [N, T].
        ref_logprobs: of the reference, at the same temperature [N, T].
        mask: True on actions [N, T]; elsewhere both may hold anything.
    """
    here, there = (zero_outside(x.double(), mask) for x in (logprobs, ref_logprobs))
    return {"kl": k1(here, there).sum(dim=1), "kl_k3": k3(here, there).sum(dim=1)}


def kl_metrics(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, group_size: int) -> dict[str, Tensor]:
    """Both estimates of a step, means over completions, and their standard errors over prompts.

    Args:
        logprobs: as `completion_kl` takes them [N, T].
        ref_logprobs: the same of the reference [N, T].
        mask: True on actions [N, T].
        group_size: completions a prompt.

    Returns:
        `kl`, `kl_stderr`, `kl_k3` and `kl_k3_stderr`; no errors of a single completion.
    """
    metrics = {}
    for name, values in completion_kl(logprobs, ref_logprobs, mask).items():
        metrics[name], error = mean_and_error(values, group_size)
        if not torch.isnan(error):
            metrics[name + "_stderr"] = error
    return metrics


def adapt_beta(learner: Learner, kl: float) -> float:
    """Set the weight of the KL for the next step, from the KL measured in this one (see `next_beta`).

    Every process measures the same, and so arrives at the same weight.

    Returns:
        The weight of this step, which is the next one's too unless `target_kl` is set.
    """
    used, args = learner.estimator.beta, learner.args
    if args.target_kl is not None:
        beta = next_beta(used, kl, target=args.target_kl, gain=args.kl_gain)
        learner.estimator = replace(learner.estimator, beta=beta)
    return used
