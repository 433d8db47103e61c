"""Makes problems so small that every completion can be listed, with its probability and its score.

An expectation over such a problem is a sum. The policy is a table of logits with one row per prefix. With
three tokens, at most three steps and token 0 as the end there are 15 completions of one to three tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokenrl.core.divergences import kl_of
from tokenrl.core.estimator import Estimator
from tokenrl.core.losses import token_entropy
from tokenrl.core.returns import at_last_action, reward_to_go
from tokenrl.core.rows import overlong_penalty
from tokenrl.lab.exact.objectives import slopes_in_probability

Rewards = Literal["binary", "graded", "continuous", "dense"]
NEVER = -1e4
"""The logit of a token that is never drawn: finite, so that no product with 0 is nan."""


class Sampler(NamedTuple):
    """What draws the completions of a problem in place of its policy; V is the size of the vocabulary."""

    logprobs: Tensor  # [P, M, T]
    """Log-probability of each token under the sampler; finite, so a token that is never drawn has -1e4."""
    scores: Tensor  # [P, M, T, D]
    """Gradient of `logprobs` in the sampler's own logits, by the parameters of the problem."""
    vocabulary: Tensor  # [P, M, T, V]
    """Log-probability of every token of the vocabulary under the sampler, at the prefix of each token."""
    policy: Tensor  # [P, M, T, V]
    """The same under the policy."""
    slopes: Tensor  # [P, M, T, V, D]
    """Gradient of `policy` in the parameters."""


@dataclass(frozen=True)
class Problem:
    """Every completion of every prompt, with all inputs that an estimator may need.

    There are P prompts, M completions of at most T tokens for each of them, and D parameters. All numbers are
    float64, and 0 outside the mask.

    Attributes:
        name: A description of the problem.
        group_size: Completions per prompt in one step.
        mask: Actions of each completion [M, T], the same for every prompt.
        truncated: True for completions that were cut off by the length and have no end [M].
        logprobs: Log-probability of each token under the policy [P, M, T].
        ref_logprobs: Log-probability of each token under the reference [P, M, T].
        entropy: Entropy of the policy at each token, in nats [P, M, T].
        token_kl: KL of the policy to the reference at the prefix of each token, in nats [P, M, T].
        rewards: One reward per completion [P, M], or one per token [P, M, T].
        scores: Gradient of `logprobs` [P, M, T, D].
        entropy_slopes: Gradient of `entropy` [P, M, T, D].
        kl_slopes: Gradient of `token_kl` [P, M, T, D].
        values: A critic's value of the prefix of each token [P, M, T].
        greedy: Index of the completion made of the most probable tokens [P].
        max_length: Divisor of the aggregation 'fixed_length'. It differs from T, so that a divisor that is
            wrongly the width of the batch shows as a bias.
        baseline_value: The running mean, a number from earlier steps.
        environment: Probability of what the environment draws in each completion, for example states [P, M].
            It is part of the probability of a completion but not of its score.
        bootstrap: A critic's value of the state after a truncation, 0 without one [P, M]; None to give the
            estimator no value.
        after: Mean of the rewards that would follow a truncation, 0 without one [P, M].
        sampler: What draws the completions; None for the policy itself.
        turns: Number of the turn of each action [M, T], where steps in time are turns; None for tokens.
    """

    name: str
    group_size: int
    mask: Tensor  # [M, T]
    truncated: Tensor  # [M]
    logprobs: Tensor  # [P, M, T]
    ref_logprobs: Tensor  # [P, M, T]
    entropy: Tensor  # [P, M, T]
    token_kl: Tensor  # [P, M, T]
    rewards: Tensor  # [P, M] or [P, M, T]
    scores: Tensor  # [P, M, T, D]
    entropy_slopes: Tensor  # [P, M, T, D]
    kl_slopes: Tensor  # [P, M, T, D]
    values: Tensor  # [P, M, T]
    greedy: Tensor  # [P]
    max_length: int
    baseline_value: float = 0.37
    environment: Tensor | float = 1.0  # [P, M]
    bootstrap: Tensor | None = None  # [P, M]
    after: Tensor | None = None  # [P, M]
    sampler: Sampler | None = None
    turns: Tensor | None = None  # [M, T]

    @property
    def of_sampler(self) -> Problem:
        """The same problem with the sampler as its policy, which `chances` and `gradient` are then of."""
        if self.sampler is None:
            return self
        return replace(
            self, logprobs=self.sampler.logprobs, scores=self.sampler.scores, sampler=None
        )

    @property
    def chances(self) -> Tensor:
        """Probability of each completion [P, M]; they sum to 1 for each prompt."""
        return self.logprobs.sum(-1).exp() * self.environment

    @property
    def totals(self) -> Tensor:
        """Undiscounted return of each completion [P, M]."""
        return self.rewards.sum(-1) if self.rewards.ndim == 3 else self.rewards

    @property
    def returns(self) -> Tensor:
        """Return of each completion [P, M], with the mean of the rewards that would follow a truncation."""
        return self.totals if self.after is None else self.totals + self.after

    def gradient(
        self,
        *,
        beta: float = 0.0,
        entropy_coef: float = 0.0,
        overlong_buffer: int = 0,
        estimator: Estimator | None = None,
    ) -> Tensor:
        """Return the gradient of `J = E[R] - beta KL(pi || ref) + entropy_coef H(pi)`, by prompt [P, D].

        R includes the penalty on long completions, if there is any, and the mean reward that would follow a
        truncation. The policy after a truncation is held fixed, so the gradient passes through the steps
        before it only.

        J is the mean over prompts; KL and H belong to whole completions. By the log-derivative trick the
        gradient is `E[(R - beta l - entropy_coef log pi) S]`, with l the log ratio and S the sum of the
        scores. The derivatives of l and of log pi themselves have mean zero. The objective of an estimator
        that is passed replaces E[R], and its derivative in the probability of the completion replaces R.
        """
        log_pi = self.logprobs.sum(-1)
        log_ref = self.ref_logprobs.sum(-1)
        weight = self.returns
        if overlong_buffer:
            lengths = self.mask.sum(-1).long()
            weight = weight + overlong_penalty(lengths, self.max_length, overlong_buffer)
        if estimator is not None:
            weight = slopes_in_probability(estimator, weight, self.chances, self.group_size)
        weight = weight - beta * (log_pi - log_ref) - entropy_coef * log_pi
        return torch.einsum("pm,pmtd->pd", self.chances * weight, self.scores) / len(self.chances)


class Completions(NamedTuple):
    """All completions: ids and mask [M, T], the index of each token's prefix [M, T], and all prefixes."""

    ids: Tensor  # [M, T]
    mask: Tensor  # [M, T]
    prefix: Tensor  # [M, T]
    prefixes: Sequence[object]

    @property
    def last(self) -> Tensor:
        """Position of the last token of each completion [M, 1]."""
        return at_last_action(self.mask.bool()).long().argmax(-1, keepdim=True)


def all_completions(vocabulary: int, length: int, ends: Sequence[int] = (0,)) -> Completions:
    """List every completion of at most `length` tokens; a token in `ends` is always the last one."""
    continuing = [token for token in range(vocabulary) if token not in ends]
    ending = [token for token in range(vocabulary) if token in ends]
    prefixes: list[tuple[int, ...]] = []
    for tokens in range(length):
        prefixes += itertools.product(continuing, repeat=tokens)
    rank = {prefix: number for number, prefix in enumerate(prefixes)}
    ids = []
    ranks = []
    lengths = []
    for prefix in prefixes:
        padding = [0] * (length - len(prefix) - 1)
        before = [rank[prefix[:t]] for t in range(len(prefix) + 1)]
        for token in ending if padding else range(vocabulary):
            ids.append([*prefix, token, *padding])
            ranks.append(before + padding)
            lengths.append([len(prefix) + 1])
    mask = torch.arange(length) < torch.tensor(lengths)
    return Completions(torch.tensor(ids), mask.double(), torch.tensor(ranks), prefixes)


def some_completions(seed: int, vocabulary: int, length: int, share: float = 0.5) -> Completions:
    """Return a share of the completions of at most `length` tokens that end, drawn at random: a language."""
    rows = all_completions(vocabulary, length)
    ended = (rows.ids.gather(1, rows.last) == 0).nonzero()[:, 0]
    order = torch.randperm(len(ended), generator=torch.Generator().manual_seed(seed))
    kept = ended[order[: math.ceil(share * len(ended))]]
    return Completions(rows.ids[kept], rows.mask[kept], rows.prefix[kept], rows.prefixes)


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
    logits: Tensor | None = None,  # [S, V]
    reference: Tensor | None = None,  # [S, V]
    sampler: Callable[[Tensor], Tensor] | None = None,
    rows: Completions | None = None,
) -> Problem:
    """Make a problem with a random policy, reference, critic and rewards.

    Args:
        seed: Seed of everything that is drawn.
        name: Name of the problem; made from the other arguments if empty.
        prompts: Number of prompts.
        group_size: Completions per prompt in one step.
        vocabulary: Number of tokens; token 0 ends a completion.
        length: Largest number of tokens of a completion.
        rewards: 'binary' (0 or 1), 'graded' (three levels), 'continuous', or 'dense' (one per token).
        shared: Whether prompts share parameters, added to logits of their own; otherwise each prompt has its
            own parameters.
        true_values: Whether the critic is V^pi, the expected reward to go, instead of a random function of
            the prefix.
        logits: Logits of every prompt's policy, by prefix and token, instead of random ones.
        reference: Logits of every prompt's reference, for example of a teacher, instead of random ones.
        sampler: Makes the sampler's logits [P, S, V] from the policy's; None for the policy.
        rows: The completions, if they are not all that `vocabulary` and `length` allow. Policy and reference are
            masked: tokens with which none of the rows goes on have probability 0.
    """
    rows = all_completions(vocabulary, length) if rows is None else rows
    shape = (prompts, len(rows.prefixes), vocabulary)
    draw = torch.Generator().manual_seed(seed)
    random, random_reference, table = torch.randn(3, *shape, generator=draw, dtype=torch.double)
    logits = random if logits is None else logits.double().expand(shape)
    ref_logits = random_reference if reference is None else reference.double().expand(shape)
    removed = torch.ones(shape[1:], dtype=torch.bool)
    tokens = rows.mask.bool()
    removed[rows.prefix[tokens], rows.ids[tokens]] = False
    logits, ref_logits = (x.masked_fill(removed, NEVER) for x in (logits, ref_logits))
    guesses = torch.randn(shape[:2], generator=draw, dtype=torch.double)
    drawn = _rewards(rewards, table, rows, draw)
    logprobs = token_logprobs(logits, rows)
    values = guesses[:, rows.prefix] * rows.mask
    if true_values:
        values = _true_values(logprobs, drawn, rows)
    ends = rows.ids.gather(1, rows.last).squeeze(1)
    return Problem(
        name=name or f"{prompts} prompts, groups of {group_size}, {rewards} rewards, seed {seed}",
        group_size=group_size,
        mask=rows.mask,
        truncated=ends != 0,
        rewards=drawn,
        values=values,
        greedy=greedy_completions(logits, rows, logprobs.sum(-1)),
        max_length=length + 2,
        sampler=None if sampler is None else _sampler(sampler(logits), logits, rows, shared),
        **of_policy(logits, ref_logits, rows, shared),
    )


def of_policy(logits: Tensor, reference: Tensor, rows: Completions, shared: bool) -> dict[str, Any]:
    """Return the fields of a `Problem` that its policy and its reference make, by their logits [P, S, V]."""
    return {
        "logprobs": token_logprobs(logits, rows),
        "ref_logprobs": token_logprobs(reference, rows),
        "entropy": token_entropies(logits, rows),
        "token_kl": token_kls(logits, rows, reference),
        "scores": slopes_of(token_logprobs, logits, rows, shared),
        "entropy_slopes": slopes_of(token_entropies, logits, rows, shared),
        "kl_slopes": slopes_of(token_kls, logits, rows, shared, reference),
    }


def _sampler(sampling: Tensor, logits: Tensor, rows: Completions, shared: bool) -> Sampler:
    """Return what is drawn from, by logits [P, S, V] of the sampler and of the policy."""
    return Sampler(
        logprobs=token_logprobs(sampling, rows),
        scores=slopes_of(token_logprobs, sampling, rows, shared),
        vocabulary=_vocabulary(sampling, rows),
        policy=_vocabulary(logits, rows),
        slopes=slopes_of(_vocabulary, logits, rows, shared),
    )


def _vocabulary(logits: Tensor, rows: Completions) -> Tensor:
    """Return the logprob of every token of the vocabulary at each prefix [..., M, T, V]."""
    return logits.log_softmax(-1)[..., rows.prefix, :] * rows.mask[..., None]


def token_logprobs(logits: Tensor, rows: Completions) -> Tensor:
    """Return the logprob of each token [..., M, T], from logits [..., S, V] of S prefixes."""
    return logits.log_softmax(-1)[..., rows.prefix, rows.ids] * rows.mask


def token_entropies(logits: Tensor, rows: Completions) -> Tensor:
    """Return the entropy at each token [..., M, T], from logits [..., S, V] of S prefixes."""
    return token_entropy(logits)[..., rows.prefix] * rows.mask


def token_kls(logits: Tensor, rows: Completions, reference: Tensor) -> Tensor:
    """Return the KL at each token [..., M, T], from logits [..., S, V] of the policy and of the reference."""
    logprobs = logits.log_softmax(-1)
    divergence = kl_of(logprobs, logprobs.exp(), reference.log_softmax(-1))
    return divergence[..., rows.prefix] * rows.mask


def slopes_of(
    quantity: Callable[..., Tensor],
    logits: Tensor,
    rows: Completions,
    shared: bool,
    *constants: Tensor,
) -> Tensor:
    """Return the gradient of a quantity in the logits, which prompts may share.

    Args:
        quantity: a function of logits [S, V], completions and constants, which returns [M, T, ...].
        logits: logits of each prompt [P, S, V].
        rows: the completions.
        shared: whether prompts share the parameters.
        *constants: further arguments of the quantity, for each prompt [P, ...].

    Returns:
        The gradient [P, M, T, ..., D].
    """
    slope = torch.func.jacrev(quantity)
    prompts = zip(logits, *constants, strict=True)
    by_prompt = torch.stack(
        [slope(x, rows, *y).flatten(-2) for x, *y in prompts]
    )  # [P, M, T, ..., S V]
    if shared:
        return by_prompt
    # Parameters of its own for each prompt: the gradient is 0 in the logits of all other prompts.
    whole = by_prompt.new_zeros(*by_prompt.shape[:-1], len(logits), by_prompt.shape[-1])
    for prompt, block in enumerate(by_prompt):
        whole[prompt, ..., prompt, :] = block
    return whole.flatten(-2)


def _rewards(kind: Rewards, table: Tensor, rows: Completions, draw: torch.Generator) -> Tensor:
    """Draw rewards [P, M], or [P, M, T] for 'dense', where each pair of prefix and token has its own."""
    if kind == "dense":
        return table[:, rows.prefix, rows.ids] * rows.mask
    drawn = torch.randn(len(table), len(rows.ids), generator=draw, dtype=torch.double)
    if kind == "binary":
        return (drawn > 0.3).double()
    if kind == "graded":
        return ((drawn > -0.5).double() + (drawn > 0.5)) / 2
    return drawn


def _true_values(logprobs: Tensor, rewards: Tensor, rows: Completions) -> Tensor:
    """Return V^pi of each token's prefix [P, M, T]: the mean reward to go of the completions with it."""
    if rewards.ndim == 2:
        rewards = rewards[:, :, None] * at_last_action(rows.mask.bool())
    chances = logprobs.sum(-1).exp()[:, :, None] * rows.mask  # [P, M, T]

    def by_prefix(x: Tensor) -> Tensor:
        sums = torch.zeros(len(x), len(rows.prefixes), dtype=torch.double)
        return sums.index_add(1, rows.prefix.flatten(), x.flatten(1))

    values = by_prefix(chances * reward_to_go(rewards)) / by_prefix(chances)
    return values[:, rows.prefix] * rows.mask


def greedy_completions(logits: Tensor, rows: Completions, log_chances: Tensor) -> Tensor:
    """Index of the completion whose every token is the most probable one, by prompt [P].

    Where an environment makes several of them, it is the most probable one, by log-probabilities [P, M].
    """
    is_best = logits.argmax(-1)[:, rows.prefix] == rows.ids  # [P, M, T]
    all_best = (is_best | (rows.mask == 0)).all(-1)
    return torch.where(all_best, log_chances, -torch.inf).argmax(-1)
