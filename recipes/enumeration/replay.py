"""Says what replayed completions do to the expected gradient, by enumeration in float64.

    python recipes/enumeration/replay.py

Two completions are sampled from an older policy and go into the replay of `tokenrl train`. A completion that it keeps,
drawn with equal probabilities, is learnt from under the present policy. All pairs are listed, so the expected gradient
of that row is exact. Look at the bias, its distance from the gradient of the mean reward relative to the length of the
latter. The row is weighted by the importance of the estimator. `recipes/pages/explain/off_policy.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import itertools
from statistics import median

import torch
import tyro
from torch import Tensor

from tokenrl import Estimator

TOKENS = 3
LENGTH = 2
COMPLETIONS = list(itertools.product(range(TOKENS), repeat=LENGTH))
WEIGHTS = {"none": "none", "tokens": "token", "sequences": "sequence"}


def token_logprobs(logits: Tensor) -> Tensor:
    """Return the log-probabilities of the tokens of each completion [N, LENGTH].

    Args:
        logits: those of the first token, and of the second behind each first one [1 + TOKENS, TOKENS].
    """
    table = logits.log_softmax(dim=1)
    rows = [torch.stack([table[0, a], table[1 + a, b]]) for a, b in COMPLETIONS]
    return torch.stack(rows)


def kept(rewards: Tensor, pair: tuple[int, int], capacity: int) -> list[int]:
    """Return the numbers of the completions that are kept of a pair."""
    distinct = dict.fromkeys(pair)
    return sorted(distinct, key=lambda number: -float(rewards[number]))[:capacity]


def bias(seed: int, weights: str, capacity: int) -> float:
    """Return the relative bias of the expected gradient of a replayed row.

    Args:
        seed: seed of both policies and of the rewards.
        weights: a name of `WEIGHTS`.
        capacity: completions that are kept: with 1 the better of two, with 2 both.
    """
    draw = torch.Generator().manual_seed(seed)
    shape = (1 + TOKENS, TOKENS)
    older = torch.randn(shape, generator=draw, dtype=torch.float64)
    moved = 0.5 * torch.randn(shape, generator=draw, dtype=torch.float64)
    present = (older + moved).requires_grad_()
    rewards = torch.rand(len(COMPLETIONS), generator=draw, dtype=torch.float64)
    old_tokens = token_logprobs(older)
    tokens = token_logprobs(present)
    objective = (tokens.sum(dim=1).exp() * rewards).sum()
    (true,) = torch.autograd.grad(objective, present, retain_graph=True)

    chances = old_tokens.sum(dim=1).exp()
    shares = torch.zeros_like(chances)  # how often each completion is the replayed one
    for pair in itertools.product(range(len(COMPLETIONS)), repeat=2):
        numbers = kept(rewards, pair, capacity)
        shares[numbers] += chances[list(pair)].prod() / len(numbers)

    estimator = Estimator.preset("reinforce", importance=WEIGHTS[weights])
    ones = torch.ones_like(tokens)
    loss = estimator.loss(
        tokens,
        rewards,
        ones * shares[:, None],
        ones.bool(),
        old_logprobs=tokens.detach(),
        sampling_logprobs=old_tokens,
    )
    (gradient,) = torch.autograd.grad(-loss, present)
    return float((gradient - true).norm() / true.norm())


def main(problems: int = 20) -> None:
    """Print the median bias over random problems.

    Args:
        problems: number of problems.
    """
    print(f"{'weights':12} {'the better is kept':>20} {'both are kept':>16}")
    for weights in WEIGHTS:
        medians = []
        for capacity in (1, 2):
            medians.append(median(bias(seed, weights, capacity) for seed in range(problems)))
        print(f"{weights:12} {medians[0]:20.3f} {medians[1]:16.3f}")


if __name__ == "__main__":
    tyro.cli(main)
