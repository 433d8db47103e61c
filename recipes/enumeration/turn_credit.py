"""Compares advantages and divisors where an environment answers between two turns of the policy, by enumeration.

    python recipes/enumeration/turn_credit.py

What toolkits do and no setting of `Estimator` computes is written as a baseline b of the user's own, so that the
advantage is the return minus b. Look for the rows without a bias: their baseline of a turn does not depend on what
the row does from that turn on. `recipes/pages/explain/turns.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import tyro
from figures import show
from torch import Tensor
from torch.nn.functional import pad

from tokenrl import Estimator
from tokenrl.lab import exact_moments, turn_problems


def sum_of_means(
    totals: Tensor,
    *,
    rewards: Tensor,
    mask: Tensor,
    leave_one_out: bool = True,
    absent_count: bool = False,
    **_: Any,
) -> Tensor:
    """Return the sum over this and later turns of the mean reward at each turn [N, K].

    The mean is over the rows that reach the turn, or with `absent_count` over all rows.
    """
    counted = (mask | absent_count).double()
    own = counted * leave_one_out
    sums = (rewards * counted).sum(0) - rewards * own
    means = sums / (counted.sum(0) - own).clamp(min=1)
    return (means * counted).flip(-1).cumsum(-1).flip(-1)


def mean_of_turns(totals: Tensor, *, mask: Tensor, left_out: int, **_: Any) -> Tensor:
    """Return the mean of the totals over all turns of the step, less so many of the row's own turns [N]."""
    turns = mask.sum(-1)
    excluded = turns.clamp(max=left_out)
    return ((turns * totals).sum() - excluded * totals) / (turns.sum() - excluded)


def divided(totals: Tensor, *, mask: Tensor, by: str, **_: Any) -> Tensor:
    """Return the baseline [N, T] with which the advantage is RLOO's, divided by a count of tokens."""
    begins = mask & ~pad(mask[:, :-1], (1, 0))
    turn = begins.cumsum(-1)
    in_turn = (turn[:, :, None] == turn[:, None]) & mask[:, None]
    # The tokens of a row up to its last action, the environment's too.
    length = (mask * torch.arange(1.0, mask.shape[1] + 1)).amax(-1, keepdim=True)
    counts = {
        "row": length,
        "group": length.mean(0, keepdim=True),
        "turns": begins.sum(-1, keepdim=True),
        "turn": in_turn.sum(-1),
    }
    others = (totals.sum() - totals) / (len(totals) - 1)
    advantages = (totals - others)[:, None] / counts[by].expand_as(mask).clamp(min=1)
    return totals[:, None] - advantages


TO_GO = {"returns": "reward_to_go"}
TIMESTEP = TO_GO | {"baseline": "timestep_mean"}
COMPARED = {
    "advantage of a turn's tokens": {
        "the row's total, RLOO": {},
        "to go, minus the LOO of totals": TO_GO,
        "to go, minus the LOO per turn index": TIMESTEP,
        "to go, minus the own mean per turn index": TIMESTEP | {"leave_one_out": False},
        "each turn minus the own mean of that index, then summed": TO_GO
        | {"baseline": partial(sum_of_means, leave_one_out=False)},
        "the same with LOO": TO_GO | {"baseline": sum_of_means},
        "the same with LOO, a turn not reached counted as 0": TO_GO
        | {"baseline": partial(sum_of_means, absent_count=True)},
        "the own turn's reward only, LOO": TIMESTEP | {"returns": "blame_window", "window": 1},
        "every turn a sample of its own, own mean": {
            "baseline": partial(mean_of_turns, left_out=0)
        },
        "the same, leave out the turn only": {"baseline": partial(mean_of_turns, left_out=1)},
        "the same, leave out the whole row": {"baseline": partial(mean_of_turns, left_out=2)},
    },
    "divisor, with RLOO on totals": {
        "the row's chosen tokens": {"aggregation": "sequence_mean"},
        "the row's chosen and environment tokens": {"baseline": partial(divided, by="row")},
        "the row's number of turns": {"baseline": partial(divided, by="turns")},
        "mean within each turn, summed over turns": {"baseline": partial(divided, by="turn")},
        "all chosen tokens of the group": {"aggregation": "token_mean"},
        "the same and the environment's": {"baseline": partial(divided, by="group")},
    },
}
"""The rows of the two tables: fields changed from RLOO."""


def main(problems: int = 12) -> None:
    """Print |E g - grad J| / |grad J|, the median and the worst, and the least cosine of E g and grad J."""
    drawn = turn_problems()

    def measured(fields: dict[str, Any], seed: int) -> dict[str, float]:
        moments = exact_moments(Estimator(**fields), drawn[seed])
        bias = moments.relative_bias
        return {"bias": bias, "worst": bias, "least cosine": moments.cosine}

    for title, lines in COMPARED.items():
        if "divisor" in title:  # it counts tokens, so its function has to get the mask of tokens
            drawn = [replace(problem, turns=None) for problem in drawn]
        show(title, {name: partial(measured, fields) for name, fields in lines.items()}, problems)


if __name__ == "__main__":
    tyro.cli(main)
