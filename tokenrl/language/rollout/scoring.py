"""Computes log-probabilities of completions under a model, with or without gradient.

The forward pass of each distinct prompt is computed once per group, also in training: its key/value cache
stays in the autograd graph and is repeated for the rows of the group, whose completions are computed on top.
The gradient equals that of the plain forward pass and costs less. Logits are computed for completion tokens
only, and not all at once where they are many (see `head`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.language.rollout.cache import Cache, positions_of
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.head import (
    Chunks,
    head_of,
    last,
    score_tokens,
    scores_of,
    without_head,
)
from tokenrl.language.rollout.rollout import (
    Rollout,
    Table,
    pad_right,
    small_on_host,
    to_device,
    zeroed,
)

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.rollout.sampling import Sampling


@dataclass(frozen=True)
class Regime:
    """How a model is sampled and scored; `check_model` returns the fastest regime that is right for a model.

    Attributes:
        share_prompt: in scoring, compute each distinct prompt once; False if no key/value cache may be kept.
        tokens_at_once: in scoring, number of tokens whose logits may exist at once; None if the forward pass has
            to compute all of them, as where something comes after the head.
        plain_cache: whether the model's cache may only be handed back to it in sampling.
        keeps_turns: whether episodes may keep caches from turn to turn.
        remarks: what is unusual, in words, for a run's header; empty if nothing is.
    """

    share_prompt: bool = True
    tokens_at_once: int | None = None
    plain_cache: bool = False
    keeps_turns: bool = False
    remarks: Mapping[str, str] = field(default_factory=dict)


USUAL = Regime()
UNCHANGED = Distribution()
"""The distribution that the logits themselves are of."""


class Scores(NamedTuple):
    """Scores of N completions under a model; all but the log-probabilities are None unless asked for.

    The fields have the meaning of the same names in a `Rollout`. Numbers of a token are 0 off the mask; hidden states
    belong to nothing there.
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
    """[N, T], `Estimator.score_centres`, with a gradient"""
    token_kl: Tensor | None = None
    """[N, T], nats, KL of the distribution of each token to that of the reference, with a gradient"""
    states: Tensor | None = None
    """[N, T, H], what the head is given; the logits [N, T, V] of a model whose head cannot be taken apart"""


def score(
    model: nn.Module,
    rollout: Rollout,
    regime: Regime = USUAL,
    *,
    distribution: Distribution = UNCHANGED,
    entropy: bool = False,
    score_norms: bool = False,
    hidden: bool = False,
    states: bool = False,
    centres: Callable[[Tensor, Tensor], Tensor] | None = None,
    reference: tuple[Tensor, nn.Module] | None = None,
) -> Scores:
    """Score the completions of a rollout; gradients flow to the model unless they are disabled.

    Args:
        model: a causal language model.
        rollout: N completions on the CPU; see `Rollout` for shapes. They are copied to the model's device.
        regime: how the model is scored.
        distribution: the distribution of tokens that was sampled from.
        entropy: also return the entropies.
        score_norms: also return the squared norms of the scores in logit space.
        hidden: also return the last hidden state before each token.
        states: also return what the head is given for each token, see `Scores`.
        centres: a function of the log-probabilities of all tokens under the policy and the sampler
            (`sampling_distribution`), each [M, V] for M actions, whose result [M] is returned too. All logits exist
            at once then.
        reference: what the head of the reference is given for each token (`states` of its scores), and this head,
            which makes its logits. The KL to it is returned too, at the same temperature over all tokens, whatever
            `distribution` keeps.
    """
    device = next(model.parameters()).device
    actions = tuple(to_device(x, device) for x in rollout.mask.nonzero(as_tuple=True))
    count = len(actions[0])
    at_once = regime.tokens_at_once if centres is None else None
    head = None
    if at_once is not None and (states or count > at_once):
        head = head_of(model)
    with without_head(head) as inputs:
        before, *last_hidden = _forward(model, rollout, regime, hidden, inputs)
    ids = to_device(rollout.completion_ids, device)[actions]  # [M]
    keys = to_device(rollout.allowed_keys, device)[actions] if distribution.allowed else None  # [M]
    if reference is not None:
        ref_states, ref_head = reference
        reference = ref_states[actions], ref_head
    chunks = Chunks(at_once or count, distribution, entropy, score_norms, keys, reference)
    if head is not None:
        numbers = score_tokens(before[actions], head, ids, chunks)
    else:
        logp = distribution.log_probabilities(before[actions], ids, keys)  # [M, V]
        numbers = scores_of(logp, ids, slice(None), chunks)
    needed = {"logprobs": True, "entropy": entropy, "score_norms": score_norms}
    needed["token_kl"] = reference is not None
    of_each = {name: x for name, x in zip(needed, numbers, strict=True) if needed[name]}
    if centres is not None:
        of_each["centres"] = centres(logp, rollout.sampling_distribution.to(device)[actions])
    columns: dict[str, Any] = {
        name: x.new_zeros(rollout.mask.shape).index_put(actions, x) for name, x in of_each.items()
    }
    if hidden:
        columns["hidden"] = last_hidden[0]
    if states:
        columns["states"] = before.detach()
    return Scores(**columns)


@torch.no_grad()
def score_in_parts(
    model: nn.Module,
    rollout: Rollout,
    regime: Regime,
    *,
    parts: Iterable[Tensor] = (),
    **options: Any,
) -> Scores:
    """Score without an autograd graph, some rows at a time; return the scores on the CPU.

    Hidden states stay on the model's device. A part is cut to its longest completion; its entries beyond that
    are 0.

    Args:
        model: a causal language model.
        rollout: N completions.
        regime: how the model is scored.
        parts: numbers of the rows of each pass, which change time and memory only; all rows in one by default.
        **options: further options of `score`.
    """
    n, width = rollout.mask.shape
    index = [*parts] or [torch.arange(n)]
    scores = [score(model, rollout.take(rows), regime, **options) for rows in index]
    order = torch.cat(index).argsort()
    columns = dict[str, Tensor]()
    for name, *column in zip(Scores._fields, *scores, strict=True):
        if column[0] is not None:
            whole = torch.cat([pad_right(x, width) for x in column])
            columns[name] = whole[to_device(order, whole.device)]
    return Scores(**columns | small_on_host(columns))


def with_missing_fields(
    policy: Policy,
    rollout: Table,
    regime: Regime,
    sampling: Sampling,
    parts: Iterable[Tensor] = (),
) -> Table:
    """Compute what the generator did not return: log-probabilities, entropies, and what the sampling keeps.

    This takes one more forward pass, or none if nothing is missing.

    Args:
        policy: the policy that the rollout was sampled from, with the weights it had then.
        rollout: N completions.
        regime: how its model is scored.
        sampling: how it was sampled, and whether `score_norms` and `hidden` states are kept.
        parts: numbers of the rows of each pass, which change time and memory only; all rows in one by default.
    """
    needed = {
        "logprobs": True,
        "entropy": True,
        "score_norms": sampling.keep_score_norms,
        "hidden": sampling.keep_hidden,
    }
    names = [name for name in needed if needed[name] and getattr(rollout, name) is None]
    if not names:
        return rollout
    options = {name: True for name in names if name != "logprobs"}  # which all scores have
    scores = score_in_parts(
        policy.model,
        rollout,
        regime,
        distribution=sampling,
        parts=parts,
        **options,
    )
    columns: dict[str, Any] = {name: zeroed(getattr(scores, name), rollout.mask) for name in names}
    return replace(rollout, **columns)


def _forward(
    model: nn.Module,
    rollout: Rollout,
    regime: Regime,
    hidden: bool,
    inputs: list[Tensor] | None,
) -> list[Tensor]:
    """Return logits [N, T, V] and, if they are needed, hidden states [N, T, H].

    Where the head is left out, its input [N, T, H] stands for the logits; `without_head` collects it in
    `inputs`.
    """

    def read(ids: Tensor, count: int, **options: Any) -> tuple[Any, list[Tensor]]:
        """Feed tokens to the model; return what it returns, and logits and states of the last `count` tokens."""
        out = model(ids, **options, output_hidden_states=hidden)
        columns = [out.logits if inputs is None else inputs.pop()]
        if hidden:
            columns.append(out.hidden_states[-1])
        return out, [x[:, -count:] for x in columns]

    device = next(model.parameters()).device
    width = rollout.mask.shape[1]
    if regime.share_prompt:
        return _forward_shared(read, rollout, device, width)
    ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)[:, :-1]
    visible = torch.cat([rollout.prompt_mask, torch.ones_like(rollout.mask)], dim=1)[:, :-1]
    positions = positions_of(to_device(visible, device), ids.shape[1])
    options = {"use_cache": False, "logits_to_keep": last(width, device)}
    return read(to_device(ids, device), width, **positions, **options)[1]


def _forward_shared(
    read: Callable[..., tuple[Any, list[Tensor]]],
    rollout: Rollout,
    device: torch.device,
    width: int,
) -> list[Tensor]:
    """Return the same as `_forward`, with each distinct prompt computed once."""
    first_row, prompt = rollout.distinct_prompts()
    index = to_device(prompt, device)
    ids = to_device(rollout.prompt_ids[first_row], device)
    mask = to_device(rollout.prompt_mask[first_row], device)
    is_padded = not bool(rollout.prompt_mask.all())
    positions = positions_of(mask, ids.shape[1]) if is_padded else {}
    out, first = read(ids, 1, **positions, use_cache=True, logits_to_keep=last(1, device))
    first = [x[index] for x in first]  # [N, 1, ...]
    if width == 1:
        return first
    cache = Cache.of(out)
    cache.select(index)
    tokens = to_device(rollout.completion_ids[:, :-1], device)  # [N, T-1]
    if cache.recurrent:
        cache.keep_states()
        if width == 2:  # a single token takes the kernels of sampling, which have no gradient
            tokens = torch.cat([tokens, tokens], dim=1)
    if is_padded:
        # Completions are padded on the right, where causal attention never looks: it needs no mask.
        visible = torch.cat([mask[index], torch.ones_like(tokens, dtype=torch.bool)], dim=1)
        positions = positions_of(visible, tokens.shape[1])
    _, later = read(tokens, tokens.shape[1], **cache.arguments(positions), use_cache=True)
    pairs = zip(first, later, strict=True)
    return [torch.cat(pair, dim=1)[:, :width] for pair in pairs]
