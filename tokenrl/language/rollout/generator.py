"""Generators: what samples completions for a run, and the one that is used unless a run has another.

`TransformersGenerator` samples from the very model that is trained, each prompt computed once. Tokens are
drawn by inverse CDF from uniforms fixed by (stream, seed, step, prompt, generation, position), so a
completion does not depend on what else is in the batch or on how many processes share the work, and two
estimators can be compared on common random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tokenrl.core.entropy import entropy_of
from tokenrl.errors import Stopped
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.distribution import log_softmax, score_norm_of
from tokenrl.language.rollout.rollout import Rollout, pad_left
from tokenrl.language.rollout.sampling import Sampling


class Generator(Protocol):
    """What samples completions. An engine with a copy of the weights of its own takes them over in `sync`."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample `sampling.group_size` completions of each prompt.

        Args:
            prompt_ids: ids of B prompts, of any lengths.
            sampling: length, temperature, and completions of each prompt.
            draws: uniforms [B * G, T] to draw the tokens by, or None for greedy completions. An engine that
                has random numbers of its own learns from them only which of the two is wanted.

        Returns:
            A `Rollout` of N = B * G rows. Ids, masks, logprobs and truncations are always there; what else
            is None is computed by `scoring.completed` when somebody needs it.
        """
        ...

    def sync(self, policy: Policy) -> None:
        """Sample from these weights from now on; called after each step's updates."""
        ...

    def close(self) -> None:
        """Free what the generator holds; nothing is sampled afterwards."""
        ...


@dataclass(frozen=True)
class TransformersGenerator:
    """Samples from the policy's own model, so there is nothing to take over and nothing to free.

    Each distinct prompt is computed once and its key/value cache repeated over the group; finished rows
    leave the batch.
    """

    policy: Policy

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions; all that a `Rollout` can hold is there, hidden states only if asked for.

        Raises:
            Stopped: the model gave logits that are not finite.
        """
        model = self.policy.model
        training = model.training
        model.eval()
        try:
            return _decode(self.policy, prompt_ids, sampling, draws)
        finally:
            model.train(training)

    def sync(self, policy: Policy) -> None:
        """Do nothing: the policy's own weights are the ones that are sampled from."""

    def close(self) -> None:
        """Do nothing: nothing is held."""


def _decode(
    policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
) -> Rollout:
    device, length = policy.device, sampling.max_completion_length
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id, device)
    prompt_index = torch.arange(len(prompts), device=device).repeat_interleave(sampling.group_size)
    shape = (len(prompt_index), length)
    ids = torch.full(shape, policy.pad_id, device=device)  # [N, T]
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    eos = torch.tensor(policy.eos_ids, device=device)
    draws = None if draws is None else draws.to(device, _cdf_dtype(device))

    state = _Decoder(policy.model, prompt_ids, prompt_mask, prompt_index, sampling.keep_hidden)
    dtype = torch.promote_types(state.logits.dtype, torch.float32)
    numbers = torch.zeros(3, *shape, device=device, dtype=dtype)  # logprobs, entropy, score norms
    hidden = state.hidden.new_zeros(*shape, state.hidden.shape[-1]) if sampling.keep_hidden else None
    rows = torch.arange(shape[0], device=device)  # the rows still in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)  # of those, the unfinished
    for t in range(length):
        token, drawn = _draw(
            log_softmax(state.logits, sampling.temperature), None if draws is None else draws[rows, t]
        )
        where = rows[alive]
        ids[where, t] = token[alive]
        numbers[:, where, t] = drawn[:, alive]
        mask[where, t] = True
        if hidden is not None:
            hidden[where, t] = state.hidden[alive]
        alive = alive & ~torch.isin(token, eos)
        remaining = int(alive.sum())
        if not remaining or t + 1 == length:
            break
        if remaining <= 0.75 * len(rows):  # copying the cache costs about as much as a few dead rows
            state.keep(alive)
            rows, token, alive = rows[alive], token[alive], alive[alive]
        state.advance(token)
    truncated = ~(mask & torch.isin(ids, eos)).any(dim=1)
    logprobs, entropy, norms = numbers
    rollout = Rollout(
        prompt_ids, prompt_mask, prompt_index, ids, mask, logprobs, truncated, entropy, norms, hidden
    )
    return rollout.rows(torch.arange(shape[0], device=device))  # cut to the longest completion


class _Decoder:
    """The model, its cache and the logits of the next token of each row in the batch."""

    logits: Tensor  # [n, V]
    hidden: Tensor  # [n, H], or the logits where it is not kept

    def __init__(
        self,
        model: nn.Module,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        prompt_index: Tensor,
        keep_hidden: bool,
    ) -> None:
        self.model = model
        self.options = {"use_cache": True, "output_hidden_states": keep_hidden}
        # Without padding no mask is passed: attention then takes its fast path.
        self.mask = None if bool(prompt_mask.all()) else prompt_mask
        self.position = prompt_mask.sum(dim=1)  # [B], of the next token
        out = model(prompt_ids, **self._places(prompt_ids.shape[1]), **self.options, logits_to_keep=1)
        self._take(out)
        self._select(prompt_index)

    def _places(self, width: int) -> dict[str, Tensor]:
        if self.mask is None:
            return {}
        steps = torch.arange(width, device=self.position.device) - width  # [-width .. -1]
        return {
            "attention_mask": self.mask,
            "position_ids": (self.position[:, None] + steps).clamp(min=0),
        }

    def _select(self, index: Tensor) -> None:
        self.cache.batch_select_indices(index)
        self.logits, self.hidden = self.logits[index], self.hidden[index]
        self.position = self.position[index]
        self.mask = None if self.mask is None else self.mask[index]

    def keep(self, alive: Tensor) -> None:
        self._select(alive.nonzero().squeeze(1))

    def advance(self, token: Tensor) -> None:
        """Feed one token [n] to each row."""
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        self._take(self.model(token[:, None], **self._places(1), **self.options, past_key_values=self.cache))

    def _take(self, out: Any) -> None:
        self.cache = out.past_key_values
        self.logits = out.logits[:, -1]
        self.hidden: Tensor = (
            out.hidden_states[-1][:, -1] if self.options["output_hidden_states"] else self.logits
        )


def _cdf_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64


def _draw(logp: Tensor, draw: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row from log-probabilities [n, V] and uniforms [n].

    Returns:
        The tokens [n]; of each its log-probability, the entropy, and its score's squared norm [3, n].
    """
    p = logp.exp()
    spread = entropy_of(logp, p)  # [n]
    # A NaN anywhere in a row's logits is a NaN in its entropy: one look serves both.
    if not bool(torch.isfinite(spread).all()):
        raise Stopped(
            "The model gave logits that are not finite while sampling. Its weights have probably diverged: "
            "lower the learning rate, or go back to an earlier checkpoint; with float16 try bfloat16 or "
            "float32."
        )
    if draw is None:
        token = logp.argmax(dim=-1)
    else:
        cdf = p.to(draw.dtype).cumsum(dim=-1)
        # The last entry is the total, which rounding leaves near 1. right=True: the first entry above the
        # draw, so a token of probability zero is never taken.
        token = torch.searchsorted(cdf, (draw * cdf[:, -1])[:, None], right=True).squeeze(1)
        token = token.clamp(max=logp.shape[-1] - 1)
    chosen = logp.gather(1, token[:, None]).squeeze(1)
    return token, torch.stack([chosen, spread, score_norm_of(chosen, p)])
