"""Problems so small that everything that can happen is listed: each completion, its chance, its score.

An expectation over such a problem is a sum. The policy is a table of logits, one row a prefix; with three
tokens, at most three steps and token 0 as the end there are 15 completions of one to three tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenrl.core.entropy import token_entropy
from tokenrl.core.rows import overlong_penalty

Rewards = Literal["binary", "graded", "continuous", "dense"]


@dataclass(frozen=True)
class Problem:
    """Every completion of every prompt, with all that an estimator may ask for.

    P prompts, M completions of at most T tokens, D parameters; float64; 0 off the mask.

    Attributes:
        name: What it is, in words.
        group_size: Completions a prompt in one step.
        mask: Actions of each completion [M, T], the same for every prompt.
        truncated: Completions cut off by the length, without an end [M].
        logprobs: Of each token under the policy [P, M, T].
        ref_logprobs: Under the reference [P, M, T].
        entropy: Of the step at which each token is taken, nats [P, M, T].
        rewards: [P, M], or [P, M, T] when paid step by step.
        scores: Gradient of `logprobs` [P, M, T, D].
        entropy_slopes: Gradient of `entropy` [P, M, T, D].
        values: What a critic says of the prefix of each token [P, M, T].
        greedy: The completion of most probable tokens [P].
        max_length: Divisor of the aggregation 'fixed_length'; not T, so that a divisor made of the width of
            the batch would show.
        baseline_value: The running mean, a number from earlier steps.
        environment: Chance of what the policy does not draw, states say, in each completion [P, M]; it is in
            the chance of a completion and not in its score.
        bootstrap: What a critic says of the state after a cut, 0 without a cut [P, M]; None to tell nothing.
        after: Mean reward of each of the K steps that would follow a cut, 0 without a cut [P, M, K].
    """

    name: str
    group_size: int
    mask: Float[Tensor, "M T"]
    truncated: Bool[Tensor, " M"]
    logprobs: Float[Tensor, "P M T"]
    ref_logprobs: Float[Tensor, "P M T"]
    entropy: Float[Tensor, "P M T"]
    rewards: Float[Tensor, "P M *T"]
    scores: Float[Tensor, "P M T D"]
    entropy_slopes: Float[Tensor, "P M T D"]
    values: Float[Tensor, "P M T"]
    greedy: Int[Tensor, " P"]
    max_length: int
    baseline_value: float = 0.37
    environment: Float[Tensor, "P M"] | float = 1.0
    bootstrap: Float[Tensor, "P M"] | None = None
    after: Float[Tensor, "P M K"] | None = None

    @property
    def chances(self) -> Float[Tensor, "P M"]:
        """Probability of each completion; they sum to 1 for each prompt."""
        return self.logprobs.sum(-1).exp() * self.environment

    @property
    def totals(self) -> Float[Tensor, "P M"]:
        """Undiscounted return of each completion."""
        return self.rewards.sum(-1) if self.rewards.ndim == 3 else self.rewards

    def worths(self, gamma: float = 1.0) -> Float[Tensor, "P M"]:
        """Return of each completion, discounted from its first step, with the mean of what a cut takes."""
        lengths = self.mask.sum(-1)
        if self.rewards.ndim == 3:
            worths = self.rewards @ gamma ** torch.arange(self.mask.shape[1], dtype=torch.double)
        else:
            worths = self.rewards * gamma ** (lengths - 1)
        if self.after is None:
            return worths
        later = self.after @ gamma ** torch.arange(self.after.shape[2], dtype=torch.double)
        return worths + gamma**lengths * later

    def gradient(
        self,
        *,
        beta: float = 0.0,
        entropy_coef: float = 0.0,
        overlong_buffer: int = 0,
        gamma: float = 1.0,
    ) -> Float[Tensor, "P D"]:
        """Gradient of `J = E[R] - beta KL(pi || ref) + entropy_coef H(pi)`, what each prompt adds to it.

        R contains the penalty on long completions, if there is one, and what would follow a cut on average:
        then this is the gradient through the steps before the cut, the policy held fixed after it. With
        gamma < 1 the rewards are discounted from the first step, the other terms are not.

        J is the mean over prompts, KL and H are those of whole completions. By the log-derivative trick
        it is `E[(R - beta l - entropy_coef log pi) S]`, with l the log ratio and S the sum of scores: what
        the derivatives of l and of log pi themselves would add has mean zero.
        """
        log_pi, log_ref = self.logprobs.sum(-1), self.ref_logprobs.sum(-1)
        worth = self.worths(gamma) - beta * (log_pi - log_ref) - entropy_coef * log_pi
        if overlong_buffer:
            worth = worth + overlong_penalty(self.mask.sum(-1).long(), self.max_length, overlong_buffer)
        return torch.einsum("pm,pmtd->pd", self.chances * worth, self.scores) / len(self.chances)


class Completions(NamedTuple):
    """All completions: ids and mask [M, T], the row of each token's prefix [M, T], and the prefixes."""

    ids: Int[Tensor, "M T"]
    mask: Float[Tensor, "M T"]
    prefix: Int[Tensor, "M T"]
    prefixes: list[tuple[int, ...]]

    @property
    def last(self) -> Int[Tensor, " M 1"]:
        """Place of the last token of each completion."""
        return self.mask.sum(-1, keepdim=True).long() - 1


def all_completions(vocabulary: int, length: int, ends: Sequence[int] = (0,)) -> Completions:
    """List every completion of at most `length` tokens, of which one in `ends` is the last if it occurs."""
    going_on = [v for v in range(vocabulary) if v not in ends]
    prefixes = [y for n in range(length) for y in itertools.product(going_on, repeat=n)]
    every = [
        (*prefix, v)
        for prefix in prefixes
        for v in range(vocabulary)
        if v in ends or len(prefix) + 1 == length
    ]
    rank = {prefix: row for row, prefix in enumerate(prefixes)}
    pad = ends[0] if ends else 0
    ids = torch.tensor([[*y, *[pad] * (length - len(y))] for y in every])
    lengths = torch.tensor([len(y) for y in every])
    mask = (torch.arange(length) < lengths[:, None]).double()
    prefix = torch.tensor([[rank[y[:t]] if t < len(y) else 0 for t in range(length)] for y in every])
    return Completions(ids, mask, prefix, prefixes)


def tabular_problem(
    seed: int,
    *,
    name: str = "",
    prompts: int = 1,
    group_size: int = 2,
    vocabulary: int = 3,
    length: int = 3,
    rewards: Rewards = "continuous",
    shared: bool = False,
    true_values: bool = False,
    even: bool = False,
) -> Problem:
    """Draw a random policy, reference, critic and rewards.

    Args:
        seed: Of all that is drawn.
        name: What to call it; made of the other arguments if empty.
        prompts: How many.
        group_size: Completions a prompt in one step.
        vocabulary: Tokens, of which 0 ends a completion.
        length: The most tokens of a completion.
        rewards: 'binary' 0 or 1, 'graded' on three levels, 'continuous', or 'dense': paid at each token.
        shared: Prompts move the same logits (each starting from its own) instead of logits of their own.
        true_values: The critic is V^pi, the expected reward to go, instead of any function of the prefix.
        even: With two tokens each has the chance 1/2, with three one has 1/2 and two have 1/4, so that a
            step can hold every completion in exact proportion.
    """
    every = all_completions(vocabulary, length)
    shape = (prompts, len(every.prefixes), vocabulary)
    draw = torch.Generator().manual_seed(seed)
    logits, reference, table = torch.randn(3, *shape, generator=draw, dtype=torch.double)
    guesses = torch.randn(shape[:2], generator=draw, dtype=torch.double)
    if even:
        rare = 0.5 if vocabulary == 2 else 0.25
        logits = torch.where(logits == logits.amax(-1, keepdim=True), 0.5, rare).double().log()
    earned = _rewards(rewards, table, every, draw)
    logprobs = torch.stack([_logprobs(x, every) for x in logits])
    values = _true_values(logprobs, earned, every) if true_values else guesses[:, every.prefix] * every.mask
    ends = every.ids.gather(1, every.last).squeeze(1)
    return Problem(
        name=name or f"{prompts} prompts, groups of {group_size}, {rewards} rewards, seed {seed}",
        group_size=group_size,
        mask=every.mask,
        truncated=ends != 0,
        logprobs=logprobs,
        ref_logprobs=torch.stack([_logprobs(x, every) for x in reference]),
        entropy=torch.stack([_entropy(x, every) for x in logits]),
        rewards=earned,
        scores=_slopes(_logprobs, logits, every, shared),
        entropy_slopes=_slopes(_entropy, logits, every, shared),
        values=values,
        greedy=torch.stack([_greedy(x, every) for x in logits]),
        max_length=length + 2,
    )


def _logprobs(logits: Tensor, every: Completions) -> Tensor:
    """Logprobs [M, T] of each token, from logits [S, V]."""
    return logits.log_softmax(-1)[every.prefix, every.ids] * every.mask


def _entropy(logits: Tensor, every: Completions) -> Tensor:
    """Entropy [M, T] of each step that is taken."""
    return token_entropy(logits)[every.prefix] * every.mask


def _slopes(
    quantity: Callable[[Tensor, Completions], Tensor], logits: Tensor, every: Completions, shared: bool
) -> Float[Tensor, "P M T D"]:
    """Gradient of logprobs or entropy in the logits, of all prompts side by side unless they share them."""
    blocks = [torch.func.jacrev(quantity)(x, every).flatten(2) for x in logits]  # [M, T, S V] each
    if shared:
        return torch.stack(blocks)
    whole = torch.zeros(len(blocks), *blocks[0].shape[:2], len(blocks), blocks[0].shape[2]).double()
    for x, block in enumerate(blocks):
        whole[x, :, :, x] = block
    return whole.flatten(3)


def _rewards(kind: Rewards, table: Tensor, every: Completions, draw: torch.Generator) -> Tensor:
    """Rewards [P, M], or [P, M, T] for 'dense', where each prefix and token has its own."""
    if kind == "dense":
        return table[:, every.prefix, every.ids] * every.mask
    drawn = torch.randn(len(table), len(every.ids), generator=draw, dtype=torch.double)
    if kind == "binary":
        return (drawn > 0.3).double()
    return ((drawn > -0.5).double() + (drawn > 0.5).double()) / 2 if kind == "graded" else drawn


def _true_values(logprobs: Tensor, rewards: Tensor, every: Completions) -> Tensor:
    """V^pi [P, M, T] of each token's prefix: the mean reward to go of the completions that run through it."""
    if rewards.ndim == 2:
        rewards = torch.zeros_like(logprobs).scatter(
            2, every.last.expand(len(rewards), -1, 1), rewards[:, :, None]
        )
    to_go = rewards.flip(-1).cumsum(-1).flip(-1)
    weight = logprobs.sum(-1).exp()[:, :, None] * every.mask  # [P, M, T]
    sums = torch.zeros(2, len(rewards), len(every.prefixes), dtype=torch.double)
    for t in range(every.mask.shape[1]):
        for which, what in enumerate((weight * to_go, weight)):
            sums[which].index_add_(1, every.prefix[:, t], what[:, :, t])
    return (sums[0] / sums[1])[:, every.prefix] * every.mask


def _greedy(logits: Tensor, every: Completions) -> Tensor:
    """Index of the completion whose every token is the most probable one."""
    best = logits.argmax(-1)[every.prefix] == every.ids  # [M, T]
    return (best | (every.mask == 0)).all(-1).int().argmax()
