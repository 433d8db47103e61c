"""Sampling groups of completions, each prompt computed once.

Tokens are drawn by inverse CDF from uniforms fixed by (seed, step, prompt, generation, position), so a
completion does not depend on what else is in the batch or on how many processes share the work, and two
estimators can be compared on common random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.core.entropy import entropy_of
from tokenrl.errors import Stopped
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.rollout import Rollout, pad_left


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    *,
    num_generations: int,
    max_completion_length: int,
    temperature: float = 1.0,
    draws: Tensor | None,
    keep_hidden: bool = False,
) -> Rollout:
    """Sample `num_generations` completions of each prompt.

    Each distinct prompt is computed once and its key/value cache repeated over the group; finished rows
    leave the batch.

    Args:
        policy: the policy; its model is put in eval mode meanwhile.
        prompts: ids of B prompts, of any lengths.
        num_generations: G, rows a prompt.
        max_completion_length: T, the most tokens a completion may have, EOS included.
        temperature: divides the logits before the softmax; part of the policy that is sampled and scored.
        draws: uniforms [B * G, T], or None for the greedy completion.
        keep_hidden: also return the last hidden states.

    Returns:
        A `Rollout` of N = B * G rows.

    Raises:
        Stopped: the model gave logits that are not finite.
    """
    training = policy.model.training
    policy.model.eval()
    try:
        return _decode(
            policy, prompts, num_generations, max_completion_length, temperature, draws, keep_hidden
        )
    finally:
        policy.model.train(training)


def _decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    num_generations: int,
    max_completion_length: int,
    temperature: float,
    draws: Tensor | None,
    keep_hidden: bool,
) -> Rollout:
    device = policy.device
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id, device)
    prompt_index = torch.arange(len(prompts), device=device).repeat_interleave(num_generations)
    shape = (len(prompt_index), max_completion_length)
    ids = torch.full(shape, policy.pad_id, device=device)  # [N, T]
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    eos = torch.tensor(policy.eos_ids, device=device)
    draws = None if draws is None else draws.to(device, _cdf_dtype(device))

    state = _Decoder(policy.model, prompt_ids, prompt_mask, prompt_index, keep_hidden)
    dtype = torch.promote_types(state.logits.dtype, torch.float32)
    numbers = torch.zeros(3, *shape, device=device, dtype=dtype)  # logprobs, entropy, score norms
    hidden = state.hidden.new_zeros(*shape, state.hidden.shape[-1]) if keep_hidden else None
    rows = torch.arange(shape[0], device=device)  # the rows still in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)  # of those, the unfinished
    for t in range(max_completion_length):
        token, drawn = _draw(
            log_softmax(state.logits, temperature), None if draws is None else draws[rows, t]
        )
        where = rows[alive]
        ids[where, t] = token[alive]
        numbers[:, where, t] = drawn[:, alive]
        mask[where, t] = True
        if hidden is not None:
            hidden[where, t] = state.hidden[alive]
        alive = alive & ~torch.isin(token, eos)
        remaining = int(alive.sum())
        if not remaining or t + 1 == max_completion_length:
            break
        if remaining <= 0.75 * len(rows):  # copying the cache costs about as much as a few dead rows
            state.keep(alive)
            rows, token, alive = rows[alive], token[alive], alive[alive]
        state.advance(token)
    truncated = ~(mask & torch.isin(ids, eos)).any(dim=1)
    logprobs, entropy, norms = numbers
    rollout = Rollout(
        prompt_ids, prompt_mask, prompt_index, ids, mask, logprobs, entropy, truncated, norms, hidden
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


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [..., V] at a temperature, in float32 at least."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


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
    norm = 1 - 2 * chosen.exp() + p.square().sum(dim=-1)
    return token, torch.stack([chosen, spread, norm])
