"""Compares what an engine says of its completions with the trainer.

An engine may compute in another precision or sample from weights that are an update old, so its numbers need
not equal the trainer's. What is refused here is further away than that.
"""

from __future__ import annotations

import math

import torch

from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.agreement import WrongRollout
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Regime, score_in_parts
from tokenrl.runs.processes import gather_objects

COMPARED = 32
"""Greedy completions of an engine that the trainer scores for a check alone, at most."""
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
SHARES = (-0.03, -0.01, 0.01, 0.03)
"""The share of its capital that each bet puts on a token: below 0 that the engine is surer than it says. Larger ones
would notice some lies earlier, but may lose more than there is on an improbable token."""
LEAST = 0.05
"""What a bet keeps at least at a token. It would lose more only where a token is less probable than e^-31."""
CERTAIN = math.log(1e6)
"""The log of the capital from which a bet is won; an honest engine gets there in one of a million runs."""
LESS_PROBABLE = 0.25
"""Nats by which a greedy token may be less probable than the most probable one, as an engine rounds in its own way;
and the share of the tokens that may be even less probable."""


def check_samples(rows: Rollout, sampling: Sampling, limit: float) -> None:
    """Compare sampled completions with the trainer.

    Args:
        rows: N completions with the trainer's `logprobs`.
        sampling: how they were sampled.
        limit: nats per token by which a row, or all rows together, may differ at temperature 1.

    Raises:
        WrongRollout: log-probabilities of the sampled tokens differ by more.
    """
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


class Bets:
    """Bets that an engine does not sample from the probabilities that it reports.

    Minus the log-probability of a token that is drawn from p is the entropy H(p) on average. If the token is drawn
    from mu, as the engine reports, the same holds with p/mu as its weight, however far mu is from p. So the
    surprise `p/mu (-log p - H(p))` is 0 on average at each token, and a capital that is multiplied by
    `1 + share * surprise` there stays the same on average, whatever the variance and after how many steps one
    looks. By Ville's inequality it ever reaches a million times its start in one of a million honest runs
    (betting: Waudby-Smith and Ramdas 2024, arXiv 2010.09686). Where the engine has another temperature or other
    weights, or keeps the more probable of two completions, one of the bets grows exponentially.

    The rows have to be all that was sampled, before any are left out for their rewards.

    Attributes:
        capital: the log of what each of the bets `SHARES` has made of 1.
    """

    def __init__(self) -> None:
        """Begin with a capital of 1 for each bet."""
        self.capital = torch.zeros(len(SHARES), dtype=torch.float64)
        self._placed = torch.zeros(3 + len(SHARES), dtype=torch.float64)

    def place(self, rows: Rollout) -> None:
        """Put the bets on all tokens of N completions, which have the trainer's `logprobs` and `entropy` by now."""
        reported = (rows.logprobs, rows.entropy, rows.sampling_logprobs)
        logp, entropy, of_sampler = (x[rows.mask].double() for x in reported)  # [M]
        gaps = logp - of_sampler
        surprise = -gaps.clamp(max=30).exp() * (logp + entropy)
        gains = (1 + surprise[:, None] * torch.tensor(SHARES)).clamp(min=LEAST).log()
        columns = (torch.ones_like(gaps), gaps.abs(), surprise)
        self._placed += torch.cat([torch.stack(columns, dim=1), gains], dim=1).sum(dim=0)

    def settle(self) -> dict[str, float]:
        """Add what the bets made of the rows that all processes have placed since; every process has to call this.

        Returns:
            `sampling/surprise`, the mean over these tokens in nats, and `sampling/evidence`, the log of the mean
            capital of the bets in the whole run. Nothing where the engine reports other log-probabilities than
            the trainer's, of which other checks tell; a weight p/mu may be far from 1 there.

        Raises:
            WrongRollout: the bets are won.
        """
        everywhere = torch.tensor(gather_objects([self._placed.tolist()]), dtype=torch.float64)
        sums = everywhere.sum(dim=0)
        tokens, gap, surprise = sums[:3].tolist()
        self._placed.zero_()
        if gap >= COARSE * tokens:
            return {}
        self.capital += sums[3:]
        evidence = float(self.capital.logsumexp(0)) - math.log(len(SHARES))
        if evidence > CERTAIN:
            raise WrongRollout(
                "its tokens are not drawn from the probabilities that it reports. Minus the log-probability of a token "
                f"is the entropy on average, and in this step it is {surprise / tokens:+.2g} nats away; over all steps "
                "an honest engine gets so far in one of a million runs. It may have other weights, another temperature "
                "or fewer tokens to draw from, or choose among several completions by their probability"
            )
        return {"sampling/surprise": surprise / tokens, "sampling/evidence": evidence}


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
