"""Computes log-probabilities of completions under a model, with or without gradient.

The forward pass of each distinct prompt is computed once per group, also in training: its key/value cache
stays in the autograd graph and is repeated for the rows of the group, whose completions are computed on top.
The gradient equals that of the plain forward pass and costs less. Logits are computed for completion tokens
only, and not all at once where they are many (see `head`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.head import Chunks, head_of, last, score_tokens, without_head
from tokenrl.language.rollout.rollout import Rollout, pad_right, to_device, to_host

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy


@dataclass(frozen=True)
class Scoring:
    """How a model is scored: in the usual way, or in a plainer one; `check_scoring` returns the right one.

    Attributes:
        share_prompt: compute each distinct prompt once; False if no key/value cache may be kept.
        tokens_at_once: number of tokens whose logits may exist at once; None if the forward pass has to
            compute all of them, as where something comes after the head.
        remarks: what is unusual, in words, for a run's header; empty if nothing is.
    """

    share_prompt: bool = True
    tokens_at_once: int | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)


USUAL = Scoring()
UNCHANGED = Distribution()
"""The distribution that the logits themselves are of."""


class Scores(NamedTuple):
    """Scores of N completions under a model; all but the log-probabilities are None unless asked for.

    The fields have the meaning of the same names in a `Rollout`. Entries off the mask belong to padding and
    have no meaning.
    """

    logprobs: Tensor
    """[N, T]"""
    entropy: Tensor | None = None
    """[N, T], nats"""
    score_norms: Tensor | None = None
    """[N, T]"""
    hidden: Tensor | None = None
    """[N, T, H]"""
    centres: Tensor | None = None
    """[N, T], `importance.score_centres`, with a gradient"""


def score(
    model: nn.Module,
    rollout: Rollout,
    scoring: Scoring = USUAL,
    *,
    distribution: Distribution = UNCHANGED,
    entropy: bool = False,
    score_norms: bool = False,
    hidden: bool = False,
    centres: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Scores:
    """Score the completions of a rollout; gradients flow to the model unless they are disabled.

    Args:
        model: a causal language model.
        rollout: N completions on the CPU; see `Rollout` for shapes. They are copied to the model's device.
        scoring: how the model is scored.
        distribution: the distribution of tokens that was sampled from.
        entropy: also return the entropies.
        score_norms: also return the squared norms of the scores in logit space.
        hidden: also return the last hidden state before each token.
        centres: a function of the log-probabilities of the policy and of the sampler [N, T, V], whose result
            is returned too; all logits exist at once then.
    """
    forward = _shared if scoring.share_prompt else _plain
    device = next(model.parameters()).device
    completion_ids = to_device(rollout.completion_ids, device)
    at_once = scoring.tokens_at_once if centres is None else None
    if at_once is not None and int(rollout.mask.sum()) > at_once:
        head = head_of(model)
        assert head is not None  # `check_scoring` found it
        with without_head(head) as inputs:
            inside, states = forward(model, rollout, hidden, inputs)
        chunks = Chunks(at_once, distribution, entropy, score_norms)
        row, position = rollout.mask.nonzero(as_tuple=True)
        actions = to_device(row, device), to_device(position, device)
        numbers = score_tokens(inside[actions], head, completion_ids[actions], chunks)
        logprobs, entropies, norms = (
            x.new_zeros(rollout.mask.shape).index_put(actions, x) for x in numbers
        )
        return Scores(
            logprobs, entropies if entropy else None, norms if score_norms else None, states
        )
    logits, states = forward(model, rollout, hidden, None)
    logp = distribution.log_probabilities(logits, completion_ids)  # [N, T, V]
    logprobs = logp.gather(2, completion_ids[:, :, None]).squeeze(2)
    p = logp.exp() if entropy or score_norms else logp
    # A token that is left out now, and was not when the sampler drew, has no gradient: 0 * -inf is nan.
    kept = logp.masked_fill(logp == -torch.inf, 0) if centres else logp
    return Scores(
        logprobs,
        entropy_of(logp, p) if entropy else None,
        score_norm_of(logprobs, p) if score_norms else None,
        states,
        None if centres is None else centres(kept, rollout.sampling_distribution.to(device)),
    )


@torch.no_grad()
def score_in_parts(
    model: nn.Module,
    rollout: Rollout,
    scoring: Scoring,
    *,
    rows_at_once: int | None,
    **options: Any,
) -> Scores:
    """Score without an autograd graph, some rows at a time; return the scores on the CPU.

    Hidden states stay on the model's device. A part is cut to its longest completion; its entries beyond that
    are 0.

    Args:
        model: a causal language model.
        rollout: N completions.
        scoring: how the model is scored.
        rows_at_once: rows per forward pass, which changes memory only; None for all.
        **options: further options of `score`.
    """
    n, width = rollout.mask.shape
    parts = []
    for rows in torch.arange(n).split(rows_at_once or n):
        scores = score(model, rollout.take(rows), scoring, **options)
        parts.append([None if x is None else pad_right(x, width) for x in scores])
    columns = [
        None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)
    ]
    small = [x for x in columns if x is not None and x.ndim < 3]
    host = iter(to_host(small))
    return Scores._make(x if x is None or x.ndim == 3 else next(host) for x in columns)


def with_missing_fields(
    policy: Policy,
    rollout: Rollout,
    scoring: Scoring,
    *,
    distribution: Distribution,
    rows_at_once: int | None = None,
    **needed: bool,
) -> Rollout:
    """Compute the fields that are needed and that the generator did not return.

    This takes one more forward pass, or none if nothing is missing.

    Args:
        policy: the policy that the rollout was sampled from, with the weights it had then.
        rollout: N completions.
        scoring: how its model is scored.
        distribution: the distribution of tokens that was sampled from.
        rows_at_once: rows per forward pass, which changes memory only; None for all.
        **needed: whether `logprobs`, `entropy`, `score_norms` and `hidden` states are needed.
    """
    missing = {name: True for name in needed if needed[name] and getattr(rollout, name) is None}
    if not missing:
        return rollout
    options: dict[str, Any] = missing | {"distribution": distribution, "rows_at_once": rows_at_once}
    options.pop("logprobs", None)  # every scoring computes those
    scores = score_in_parts(policy.model, rollout, scoring, **options)
    columns = dict[str, Any]()
    for name in missing:
        x = getattr(scores, name)
        off = ~rollout.mask if x.ndim == 2 else ~rollout.mask[..., None]
        columns[name] = x.masked_fill(to_device(off, x.device), 0)
    return replace(rollout, **columns)


def _positions(mask: Tensor) -> Tensor:
    """Position ids of a mask that is padded on the left: the first token has position 0."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _shared(
    model: nn.Module, rollout: Rollout, hidden: bool, inputs: list[Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """Logits [N, T, V] and hidden states [N, T, H], with each distinct prompt computed once.

    Where the head is left out, its input [N, T, H] stands for the logits; `without_head` collects it in
    `inputs`.
    """
    first_row, index = rollout.distinct_prompts()
    padded = not bool(rollout.prompt_mask.all())
    width, device = rollout.mask.shape[1], next(model.parameters()).device
    ids = to_device(rollout.prompt_ids[first_row], device)
    mask = to_device(rollout.prompt_mask[first_row], device)
    index = to_device(index, device)
    positions = {"attention_mask": mask, "position_ids": _positions(mask)} if padded else {}
    options = {"use_cache": True, "output_hidden_states": hidden}
    out = model(ids, **positions, **options, logits_to_keep=last(1, mask.device))
    first = (out.logits if inputs is None else inputs.pop()[:, -1:])[index]  # [N, 1, V]
    state = out.hidden_states[-1][:, -1:][index] if hidden else None  # [N, 1, H]
    if width == 1:
        return first, state
    cache = Cache.of(out)
    cache.select(index)
    tokens = to_device(rollout.completion_ids[:, :-1], device)  # [N, T-1]
    if cache.recurrent:
        cache.keep_states()
        if (
            width == 2
        ):  # one token alone takes the kernels of sampling, which have no gradient: feed another
            tokens = torch.cat([tokens, tokens], dim=1)
    if padded:
        # Completions are padded on the right, and causal attention never looks to the right, so their
        # padding needs no mask.
        whole = torch.cat([mask[index], torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        positions = {
            "attention_mask": whole,
            "position_ids": _positions(whole)[:, -tokens.shape[1] :],
        }
    rest = model(tokens, **cache.arguments(positions), **options)
    logits = rest.logits if inputs is None else inputs.pop()
    states = None if state is None else torch.cat([state, rest.hidden_states[-1]], dim=1)[:, :width]
    return torch.cat([first, logits], dim=1)[:, :width], states


def _plain(
    model: nn.Module, rollout: Rollout, hidden: bool, inputs: list[Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """The same as `_shared`, with the prompt computed again for each row."""
    width = rollout.completion_ids.shape[1]
    device = next(model.parameters()).device
    whole = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
    visible = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.mask)], dim=1)
    ids = to_device(whole[:, :-1], device)
    mask = to_device(visible[:, :-1], device)
    options = {"use_cache": False, "output_hidden_states": hidden}
    positions = {"attention_mask": mask, "position_ids": _positions(mask)}
    out = model(ids, **positions, **options, logits_to_keep=last(width, mask.device))
    logits = out.logits if inputs is None else inputs.pop()[:, -width:]
    return logits, out.hidden_states[-1][:, -width:] if hidden else None
