"""Log-probabilities of completions under a model, the prompt computed once a group, also in training.

The forward pass of each distinct prompt keeps its key/value cache in the autograd graph; the cache is
repeated over the group's rows and the completions are computed on it. The gradient is that of the plain
forward pass, for less work. Logits exist only where there are completion tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.core.entropy import entropy_of
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import log_softmax


class Scores(NamedTuple):
    """Log-probabilities [N, T] of completion tokens and, if asked for, entropies [N, T].

    Entries off the mask are those of the padding and mean nothing.
    """

    logprobs: Tensor
    entropy: Tensor | None


def score(
    model: nn.Module,
    rollout: Rollout,
    *,
    temperature: float = 1.0,
    share_prompt: bool = True,
    entropy: bool = False,
) -> Scores:
    """Score the completions of a rollout.

    Args:
        model: a causal LM, bare or wrapped for several processes.
        rollout: prompts and completions; see `Rollout` for shapes.
        temperature: that of the sampling; divides the logits.
        share_prompt: compute each distinct prompt once; False where no cache may be kept (activation
        checkpointing).
        entropy: also return the entropies in nats, with their graph.

    Returns:
        `Scores` of shape [N, T].
    """
    logits = (_shared if share_prompt else _plain)(model, rollout)  # [N, T, V]
    logp = log_softmax(logits, temperature)
    logprobs = logp.gather(2, rollout.completion_ids[:, :, None]).squeeze(2)
    if not entropy:
        return Scores(logprobs, None)
    return Scores(logprobs, entropy_of(logp, logp.exp()))


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _shared(model: nn.Module, rollout: Rollout) -> Tensor:
    index, width = rollout.prompt_index, rollout.completion_ids.shape[1]
    prompt_mask = rollout.prompt_mask
    padded = not bool(prompt_mask.all())
    places = {"attention_mask": prompt_mask, "position_ids": _positions(prompt_mask)} if padded else {}
    out = model(rollout.prompt_ids, **places, use_cache=True, logits_to_keep=1)
    first = out.logits[index]  # [N, 1, V]
    if width == 1:
        return first
    cache = out.past_key_values
    cache.batch_select_indices(index)
    inputs = rollout.completion_ids[:, :-1]  # [N, T-1]
    places = {}
    if padded:
        # Completions are padded on the right, where causal attention never looks from within the mask.
        whole = torch.cat([prompt_mask[index], torch.ones_like(inputs, dtype=torch.bool)], dim=1)
        places = {"attention_mask": whole, "position_ids": _positions(whole)[:, -inputs.shape[1] :]}
    rest = model(inputs, **places, past_key_values=cache, use_cache=True).logits
    return torch.cat([first, rest], dim=1)


def _plain(model: nn.Module, rollout: Rollout) -> Tensor:
    width = rollout.completion_ids.shape[1]
    prompt_mask = rollout.prompt_mask[rollout.prompt_index]
    ids = torch.cat([rollout.prompt_ids[rollout.prompt_index], rollout.completion_ids], dim=1)[:, :-1]
    mask = torch.cat([prompt_mask, torch.ones_like(rollout.mask)], dim=1)[:, :-1]
    logits = model(
        ids, attention_mask=mask, position_ids=_positions(mask), use_cache=False, logits_to_keep=width
    ).logits
    return logits
