"""Measures how far the sampler's log-probabilities are from the trainer's, at the first update of a step.

A generator with weights or arithmetic of its own (another engine, another precision) samples from a policy
that is not quite the one that is trained, and so does one that leaves tokens out without saying so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenrl.language.rollout.rollout import to_host
from tokenrl.runs.processes import gather_objects


class Scored(NamedTuple):
    """The n rows of a micro-batch, with log-probabilities under both policies [n, T]."""

    mask: Tensor
    """True on actions, on the CPU [n, T]."""
    sampling_logprobs: Tensor
    """Those of the sampler, on the CPU."""
    logprobs: Tensor
    """Those of the policy that is trained, on its device."""


def differences(mask: Tensor, sampling_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """Return of each row how far sampler and trainer are apart [n, 4].

    Args:
        mask: True on actions [n, T].
        sampling_logprobs: log-probabilities of the sampler [n, T].
        logprobs: log-probabilities under the policy that is trained [n, T].

    Returns:
        The sum over tokens of the log ratio `log pi - log mu`, in nats, with pi the trainer's probability and
        mu the sampler's; the sum and the largest of its absolute values; and the number of tokens.
    """
    gaps = torch.where(mask, logprobs - sampling_logprobs, 0).double()
    sizes = gaps.abs()
    return torch.stack([gaps.sum(1), sizes.sum(1), sizes.amax(1), mask.sum(1)], dim=1)


def mismatch_metrics(parts: Sequence[Scored]) -> dict[str, float]:
    """Return the metrics of the rows of all processes; every process has to call this.

    A completion has the weight w, the exponential of the sum of its log ratios. With w the gradient would be
    that of the policy on the sampler's rows. Its mean is 1 in expectation, if the sampler can draw whatever
    the policy can, and else the policy's probability of what the sampler keeps.

    Args:
        parts: the micro-batches of this process.

    Returns:
        `sampling/logp_difference/mean` and `sampling/logp_difference/max` over tokens, in nats and without
        sign; `sampling/effective_sample_size`, `(sum w)^2 / (N sum w^2)`, the share of the N rows that as
        many rows of the policy's own would be worth; and `sampling/kept_mass`, the mean of w. They are those
        of the rows that the first update learns from; none if there are no such rows.
    """
    host = to_host(part.logprobs for part in parts)
    apart = []
    for part, logprobs in zip(parts, host, strict=True):
        apart.append(differences(part.mask, part.sampling_logprobs, logprobs))
    rows = gather_objects(torch.cat(apart).tolist() if apart else [])
    if not rows:
        return {}
    ratios, sums, largest, tokens = torch.tensor(rows, dtype=torch.float64).T
    log_total = ratios.logsumexp(0)
    effective = float((2 * log_total - (2 * ratios).logsumexp(0)).exp())
    return {
        "sampling/logp_difference/mean": float(sums.sum() / tokens.sum().clamp(min=1)),
        "sampling/logp_difference/max": float(largest.max()),
        "sampling/effective_sample_size": effective / len(rows),
        "sampling/kept_mass": float((log_total - math.log(len(rows))).exp()),
    }
