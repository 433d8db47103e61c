"""Compares what an engine says of its completions with the trainer.

An engine may compute in another precision or sample from weights that are an update old, so its numbers need
not equal the trainer's. What is refused here is further away than that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.agreement import WrongRollout
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Regime, score_in_parts

COMPARED = 32
"""Completions of an engine that the trainer scores for a check alone, at most."""
ROUNDING = 0.05
"""Largest difference, in nats per token, between the log-probabilities of the trainer and of an engine that
agrees with it, in float32."""
FIRST = 0.02
"""The same of its first completions, if all tokens may be sampled; others may be off at the edge of what is kept."""
COARSE = 0.3
"""The same of such an engine in half precision, and of any engine in later steps, of which a warning tells."""
FARTHEST = 1.0
"""The same of another engine, while both have the weights of the start. Rounded weights and another temperature
stay below it, and a warning tells of them (`sampling-differs`)."""
FARTHEST_TOKEN, SHORT = 5.0, 8
"""A token counts for at most 5 nats, also a greedy one. A row counts as 8 tokens or more."""
ELSEWHERE = 0.2
"""The largest share of probability, averaged over tokens, that an engine's distribution may have on other tokens."""
LESS_PROBABLE = 0.25
"""Nats by which a greedy token may be less probable than the most probable one, as an engine rounds in its own way;
and the share of the tokens that may be even less probable."""


def check_samples(
    rows: Rollout, sampling: Sampling, policy: Policy, regime: Regime, limit: float
) -> None:
    """Compare sampled completions with the trainer.

    Args:
        rows: N completions with the trainer's `logprobs`.
        sampling: how they were sampled.
        policy: the policy that was to be sampled.
        regime: how it is scored.
        limit: nats per token by which a row, or all rows together, may differ at temperature 1.

    Raises:
        WrongRollout: log-probabilities of the sampled tokens differ by more, or distributions of all tokens have
            more than the share `ELSEWHERE` of the probability on other tokens.
    """

    def total_variation(logp: Tensor, of_sampler: Tensor) -> Tensor:
        return (logp.exp() - of_sampler.exp()).abs().sum(dim=1) / 2

    limit /= min(1.0, sampling.temperature)  # the temperature divides what rounding changes
    gaps = (rows.sampling_logprobs - rows.logprobs).abs().double() * rows.mask  # [N, T]
    counts = rows.mask.sum(dim=1)
    # A token at the edge of what top-p keeps may be off by much, and a short row has few others.
    of_row = gaps.clamp(max=FARTHEST_TOKEN).sum(dim=1) / counts.clamp(min=SHORT)  # [N]
    row = int(of_row.argmax())
    gap = float(gaps.sum() / counts.sum().clamp(min=1))
    if max(gap, float(of_row[row])) > limit:
        raise WrongRollout(
            f"sampling_logprobs differ from the trainer's by {gap:.2g} nats per token, and by {of_row[row]:.2g} in "
            f"row {row} of {len(rows)}, so these tokens are of other weights, another distribution or another prompt"
        )
    if rows.sampling_distribution is None:
        return
    few = rows.take(torch.arange(min(COMPARED, len(rows))))
    scores: Any = score_in_parts(
        policy.model, few, regime, distribution=sampling, centres=total_variation
    )
    share = float(scores.centres[few.mask].double().mean())
    if share > ELSEWHERE:
        raise WrongRollout(
            f"sampling_distribution has {share:.0%} of the probability on other tokens than the trainer's, so it is "
            "of other weights, or not that of this sampler"
        )


def check_greedy(rows: Rollout, policy: Policy, regime: Regime) -> None:
    """Compare greedy completions of an engine with the trainer, which has the same weights then.

    Raises:
        WrongRollout: many of their tokens are not the most probable ones.
    """
    rows = rows.take(torch.arange(min(COMPARED, len(rows))))
    most_probable = Distribution(top_k=1)
    scores = score_in_parts(policy.model, rows, regime, distribution=most_probable)
    # Of the most probable token and the chosen one, the latter has log-probability -log(1 + exp(gap)).
    gaps = torch.expm1(-scores.logprobs[rows.mask]).log()
    share = float((gaps > LESS_PROBABLE).double().mean())
    if share > LESS_PROBABLE or bool((gaps > FARTHEST_TOKEN).any()):
        raise WrongRollout(f"{share:.0%} of its greedy tokens are not the most probable ones")
