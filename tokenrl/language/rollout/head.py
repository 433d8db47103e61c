"""Scores tokens from hidden states, so that the logits of a whole batch never exist at once.

With a large vocabulary the logits are by far the largest tensor of a step: 4,096 tokens times 50,000 entries
take 0.8 GB in float32, and autograd keeps several of that size. Here the model computes hidden states only,
and its head is applied to some tokens at a time. The backward pass computes the logits again and turns them
into their gradient in place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenrl.core.divergences import kl_of
from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.language.rollout.distribution import Distribution

LOGITS = 2**22
"""Most logits at once: 16 MiB in float32, which processors keep near."""
TOKENS = 256
"""But at least those of so many tokens, since each chunk also adds to the gradient of the whole head."""


def tokens_at_once(vocabulary: int) -> int:
    """Return the number of tokens whose logits are best computed at once."""
    return max(TOKENS, LOGITS // vocabulary)


def head_of(model: nn.Module) -> nn.Linear | None:
    """Return the linear layer that makes the logits, or None if the head is anything else.

    `model` may be wrapped by peft, or for several processes.
    """
    bare: Any = getattr(model, "module", model)
    head = bare.get_output_embeddings()
    # A subclass is an adapter's or a quantised layer, which do more than a product with `weight`.
    return head if type(head) is nn.Linear else None


def last(count: int, device: torch.device) -> Tensor:
    """Return the last positions [count], to be given to a model as its `logits_to_keep`.

    A number would give the head a view with gaps. Of a frozen head torch then copies the weights for each
    row, which takes more time than the product itself.
    """
    return torch.arange(-count, 0, device=device)


@contextlib.contextmanager
def without_head(head: nn.Linear | None) -> Iterator[list[Tensor] | None]:
    """Leave out the head in forward passes, and collect the input [n, t, H] that each would have given it.

    Without a head to be left out there is no list of inputs.
    """
    if head is None:
        yield None
        return
    inputs: list[Tensor] = []

    def leave_out(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(arguments[0])
        return (arguments[0][:, :0],)

    handle = head.register_forward_pre_hook(leave_out)
    try:
        yield inputs
    finally:
        handle.remove()


def score_tokens(
    states: Tensor, head: nn.Linear, ids: Tensor, chunks: Chunks
) -> tuple[Tensor, ...]:
    """Score M tokens from the hidden states before them.

    The product with the head has the precision of its weights; all else is computed in float32 or better.

    Args:
        states: what the head is given for each token [M, H].
        head: makes the logits.
        ids: the tokens [M].
        chunks: how many logits are computed at once, and which scores are needed.

    Returns:
        The log-probabilities, the entropies in nats, the squared norms of the scores in logit space, and the KL to
        the reference in nats; each [M], and 0 where it is not needed. All but the norms have a gradient.
    """
    states = states.to(head.weight.dtype)
    scores: tuple[Tensor, ...] = _Scores.apply(states, head.weight, head.bias, ids, chunks)
    return scores


class Chunks(NamedTuple):
    """How tokens are scored, some at a time.

    Attributes:
        at_once: tokens whose logits are computed at once.
        distribution: how probabilities follow from the logits.
        entropy: whether the entropies are needed.
        norms: whether the squared norms of the scores are needed.
        keys: the keys of the positions of the tokens [M], where a rule says which tokens are allowed; else None.
        reference: what the head of the reference is given for each token [M, H], and that head, for the KL
            (`states` of its `Scores`); None if no KL is needed.
    """

    at_once: int
    distribution: Distribution
    entropy: bool
    norms: bool
    keys: Tensor | None
    reference: tuple[Tensor, nn.Module] | None

    @torch.no_grad()
    def ref_logprobs(self, tokens: slice) -> Tensor:
        """Return the log-probabilities [m, V] under the reference, at the same temperature over all allowed tokens."""
        assert self.reference is not None
        states, head = self.reference
        keys = self.keys_of(tokens)
        return self.distribution.whole.log_probabilities(head(states[tokens]), keys=keys)

    def keys_of(self, tokens: slice) -> Tensor | None:
        """Return the keys of the positions of some tokens, if a rule needs them."""
        return None if self.keys is None else self.keys[tokens]

    def of(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield the place of each chunk and its logits twice, which may be written over.

        The second are in the precision of the products; the same tensor as the first if that is float32 or
        better. The next chunk overwrites their memory.
        """
        size = max(1, min(self.at_once, len(states)))
        memory = weight.new_empty(size, len(weight))
        for start in range(0, max(1, len(states)), size):
            tokens = slice(start, min(start + size, len(states)))
            product = memory[: tokens.stop - start]
            torch.mm(states[tokens], weight.T, out=product)
            if bias is not None:
                product.add_(bias)
            logits = product.to(_wide(weight))
            if self.distribution.temperature != 1:
                logits.div_(self.distribution.temperature)
            keys = self.keys_of(tokens)
            yield tokens, self.distribution.truncated(logits, ids[tokens], keys), product


class _Scores(torch.autograd.Function):
    """Scores of tokens, with a backward pass that computes the logits again.

    The gradient in the logits of log p(a) is `onehot(a) - p`, that of the entropy H is `-p (log p + H)`, and
    that of the KL to a reference q is `p (log p - log q - KL)`.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, chunks: Chunks
    ) -> tuple[Tensor, ...]:
        parts = []
        totals = []
        for tokens, logits, _ in chunks.of(states, weight, bias, ids):
            part = scores_of(logits.log_softmax(-1), ids[tokens], tokens, chunks)
            parts.append(part)
            totals.append(logits.gather(1, ids[tokens, None]).squeeze(1) - part[0])
        logprobs, entropy, norms, divergence = map(torch.cat, zip(*parts, strict=True))
        ctx.save_for_backward(states, weight, bias, ids, torch.cat(totals), entropy, divergence)
        ctx.chunks = chunks
        ctx.mark_non_differentiable(norms)
        return logprobs, entropy, norms, divergence

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, by_logprob: Tensor, by_entropy: Tensor, _: Any, by_kl: Tensor
    ) -> tuple[Any, ...]:
        *inputs, ids, total, entropy, divergence = ctx.saved_tensors
        states, weight, bias = inputs
        chunks: Chunks = ctx.chunks
        # Each chunk adds to the gradients of weight and bias, which therefore are summed in float32.
        back: list[Tensor | None] = []
        for x, is_needed in zip(inputs, ctx.needs_input_grad, strict=False):
            back.append(torch.zeros_like(x, dtype=total.dtype) if is_needed else None)
        for tokens, logits, narrow in chunks.of(states, weight, bias, ids):
            logp = logits.sub_(total[tokens, None])
            factor = -by_logprob[tokens, None]  # p is multiplied by it
            if chunks.entropy:
                bounded = logp.clamp(min=-1e4)
                factor = factor - (bounded + entropy[tokens, None]) * by_entropy[tokens, None]
            if chunks.reference is not None:
                log_ratio = logp.clamp(min=-1e4) - chunks.ref_logprobs(tokens).clamp(min=-1e4)
                factor = factor + (log_ratio - divergence[tokens, None]) * by_kl[tokens, None]
            slope = logp.exp_().mul_(factor)
            slope.scatter_add_(1, ids[tokens, None], by_logprob[tokens, None])
            slope.div_(chunks.distribution.temperature)
            if back[2] is not None:
                back[2] += slope.sum(dim=0)
            slope = slope if narrow.dtype == slope.dtype else narrow.copy_(slope)
            if back[0] is not None:
                back[0][tokens] = slope @ weight
            if back[1] is not None:
                if back[1].dtype == slope.dtype:
                    back[1].addmm_(slope.T, states[tokens])
                else:
                    back[1] += slope.T @ states[tokens]
        return (*back, None, None)  # autograd gives each the precision of its input


def scores_of(logp: Tensor, ids: Tensor, tokens: slice, chunks: Chunks) -> tuple[Tensor, ...]:
    """Return what `score_tokens` returns of m tokens with these ids [m], from all log-probabilities [m, V].

    Args:
        logp: the log-probabilities.
        ids: the tokens.
        tokens: their place among all M tokens.
        chunks: which scores are needed.
    """
    chosen = logp.gather(1, ids[:, None]).squeeze(1)
    entropy = norms = divergence = torch.zeros_like(chosen)
    if chunks.entropy or chunks.norms or chunks.reference is not None:
        p = logp.exp()
        if chunks.reference is not None:
            divergence = kl_of(logp, p, chunks.ref_logprobs(tokens))
        if chunks.entropy:
            entropy = entropy_of(logp, p)
        if chunks.norms:
            norms = score_norm_of(chosen, p)
    return chosen, entropy, norms, divergence


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
