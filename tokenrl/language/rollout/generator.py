"""Samples completions: the `Generator` protocol and its default, which samples from the policy's own model.

Tokens are drawn by inverting the CDF at uniform random numbers that are fixed by (stream, seed, step, prompt,
generation, position). A completion therefore depends neither on the other rows of its batch nor on the number
of processes, and two estimators can be compared on common random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.errors import Stopped
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.head import last
from tokenrl.language.rollout.rollout import NOT_YET, Rollout, cat, pad_left
from tokenrl.language.rollout.sampling import Sampling

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy

BLOCK = 256
"""Tokens of a block; a larger vocabulary is drawn from in two steps, first a block and then a token of it."""
LOOK_EVERY = 8
"""Tokens of a completion that a device samples between two looks at which rows are left. A look waits until
the device has computed all that it was given; rows that end before it are sampled on, and cut."""
UNIT, UNIFORM_BITS = 40, 31
"""On a device probabilities are whole numbers of 2**-UNIT, and uniforms whole numbers of 2**-UNIFORM_BITS."""

NOT_FINITE = (
    "The model's logits are not finite while sampling: its weights have probably diverged. Lower the "
    "learning rate, or go back to an earlier checkpoint; with float16 try bfloat16."
)


class Generator(Protocol):
    """An engine that samples completions. If it holds a copy of the weights, `sync` updates the copy."""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample `sampling.group_size` completions of each prompt.

        Args:
            prompt_ids: ids of B prompts, of any lengths.
            sampling: length limit, distribution of tokens, and number of completions per prompt.
            draws: uniforms [B * G, T] to draw the tokens with, or None for greedy completions. An engine with
                random numbers of its own ignores their values, and only checks whether `draws` is None.

        Returns:
            A `Rollout` of N = B * G rows, which end at an EOS of the policy or where one of its stop strings
            is complete. `prompt_index` counts the prompts from 0. The columns `logprobs`, `entropy`,
            `score_norms` and `hidden` may be None; `scoring.with_missing_fields` computes those that are
            needed.
        """
        ...

    def sync(self, policy: Policy) -> None:
        """Sample from the weights of this policy from now on; called after the updates of each step."""
        ...

    def close(self) -> None:
        """Free memory and processes that the generator holds; nothing is sampled afterwards."""
        ...


@dataclass(frozen=True)
class TransformersGenerator:
    """Samples from the policy's own model, so there are no weights to copy and nothing to free.

    The forward pass of each distinct prompt is computed once and its cache is repeated for the rows of the
    group. Rows that are finished leave the batch. For a policy with `plain_cache`, the prompt is computed for
    each row and rows stay, so that the cache is only handed back to the model.

    Attributes:
        policy: the policy whose model is sampled from.
        rows_at_once: number of completions that are sampled at once, of whole groups, which bounds the memory
            of their caches and changes nothing else; None for all.
    """

    policy: Policy
    rows_at_once: int | None = None

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions as `Generator.generate` says; every field of the `Rollout` is filled.

        Only `score_norms`, `hidden` and `sampling_distribution` are None unless `sampling` asks for them.

        Raises:
            Stopped: the model's logits are not finite.
        """
        model, size, parts = self.policy.model, sampling.group_size, []
        if draws is not None:
            draws = _on_device(draws, self.policy.device)
        groups = max(1, (self.rows_at_once or len(prompt_ids) * size) // size)
        recomputes = model.training  # only under activation checkpointing, which would keep no cache
        try:
            model.eval()
            for start in range(0, len(prompt_ids), groups):
                end = start + groups
                numbers = None if draws is None else draws[start * size : end * size]
                parts.append(_decode(self.policy, prompt_ids[start:end], sampling, numbers, start))
        finally:
            model.train(recomputes)
        return parts[0] if len(parts) == 1 else cat(parts)

    def sync(self, policy: Policy) -> None:
        """Do nothing, because the policy's own weights are sampled from."""

    def close(self) -> None:
        """Do nothing, because the generator holds nothing of its own."""


def _decode(
    policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None, first: int
) -> Rollout:
    """Sample token by token; the batch holds only unfinished rows and, for a while, a few finished ones.

    The prompts are numbered from `first` on.
    """
    device, length = policy.device, sampling.max_completion_length
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id, device)
    prompt_index = torch.arange(len(prompts), device=device).repeat_interleave(sampling.group_size)
    shape = (len(prompt_index), length)
    ids = torch.full(shape, policy.pad_id, device=device)  # [N, T]
    mask = torch.zeros(shape, dtype=torch.bool, device=device)
    eos = torch.tensor(policy.eos_ids, device=device)
    padded = len({len(prompt) for prompt in prompts}) > 1
    state = _Decoder(policy, prompt_ids, prompt_mask if padded else None, prompt_index, sampling)
    dtype = torch.promote_types(state.logits.dtype, torch.float32)
    count = 3 if sampling.keep_score_norms else 2  # logprobs, entropy, score norms
    numbers = torch.zeros(count, *shape, device=device, dtype=dtype)
    hidden = state.hidden.new_zeros(*shape, state.hidden.shape[-1]) if sampling.keep_hidden else None
    whole = numbers.new_zeros(*shape, state.logits.shape[-1]) if sampling.keep_distribution else None
    rows = torch.arange(shape[0], device=device)  # rows that are still in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)  # which of those are unfinished
    look_every = 1 if device.type == "cpu" or policy.stops is not None else LOOK_EVERY
    for t in range(length):
        token, drawn, logp = _next_token(state.logits, None if draws is None else draws[rows, t], sampling)
        mask[rows, t] = alive
        ids[rows, t] = token
        numbers[:, rows, t] = drawn
        if hidden is not None:
            hidden[rows, t] = state.hidden
        if whole is not None:
            whole[rows, t] = logp.to(dtype)
        ended = torch.isin(token, eos)
        if policy.stops is not None:
            ended[alive] |= policy.stops.ended(ids, rows[alive], t)
        alive = alive & ~ended
        if t + 1 == length:
            break
        if (t + 1) % look_every == 0:
            left = _rows_left(alive, drawn[1])
            if not len(left):
                break
            # Copying the cache costs as much as keeping a few finished rows.
            if len(left) <= 0.75 * len(rows) and not policy.plain_cache:
                left = left.to(device, non_blocking=True)
                state.select(left)
                rows, token, alive = rows[left], token[left], alive[left]
        state.advance(token)
    truncated = torch.zeros_like(mask[:, 0]).index_put((rows,), alive)  # [N], which have not ended
    off = ~mask  # finished rows were fed more tokens until they left
    ids.masked_fill_(off, policy.pad_id)
    logprobs, entropy, *norms = numbers.masked_fill_(off, 0)
    longest, finite = torch.stack([mask.any(0).sum(), torch.isfinite(entropy).all()]).tolist()
    if not finite:
        raise Stopped(NOT_FINITE)
    rollout = Rollout(
        prompt_ids=prompt_ids[prompt_index],
        prompt_mask=prompt_mask[prompt_index],
        prompt_index=first + prompt_index,
        completion_ids=ids,
        mask=mask,
        sampling_logprobs=logprobs,
        truncated=truncated,
        logprobs=logprobs,
        entropy=entropy,
        score_norms=norms[0] if norms else None,
        hidden=None if hidden is None else hidden.masked_fill_(off[..., None], 0),
        sampling_distribution=NOT_YET if whole is None else whole.masked_fill_(off[..., None], 0),
    )
    return rollout.cut(prompt_ids.shape[1], longest)


def _rows_left(alive: Tensor, entropy: Tensor) -> Tensor:
    """Return the unfinished rows of the batch, on the host, in one transfer.

    Raises:
        Stopped: an entropy is not finite. A NaN in any logit of a row makes the entropy of the row NaN.
    """
    unfinished, finite = torch.stack([alive, torch.isfinite(entropy)]).cpu()
    if not finite.all():
        raise Stopped(NOT_FINITE)
    return unfinished.nonzero().squeeze(1)


class _Decoder:
    """The model, its cache, and the logits of the next token for each row of the batch."""

    logits: Tensor  # [n, V]
    hidden: Tensor  # [n, H]; the logits stand in where hidden states are not wanted

    def __init__(
        self,
        policy: Policy,
        prompt_ids: Tensor,
        prompt_mask: Tensor | None,
        prompt_index: Tensor,
        sampling: Sampling,
    ) -> None:
        """Read the prompts; without padding there is no mask, so that attention can use a faster kernel."""
        self.model = policy.model
        self.options = {"use_cache": True, "output_hidden_states": sampling.keep_hidden}
        if policy.plain_cache:
            prompt_ids = prompt_ids[prompt_index]
            prompt_mask = None if prompt_mask is None else prompt_mask[prompt_index]
        width = prompt_ids.shape[1]
        self.mask = prompt_mask
        self.position = torch.full_like(prompt_ids[:, 0], width)  # [B], position of the next token
        if prompt_mask is not None:
            self.position = prompt_mask.sum(dim=1)
        end = last(1, prompt_ids.device)
        self._store(self.model(prompt_ids, **self._positions(width), **self.options, logits_to_keep=end))
        if not policy.plain_cache:
            self.select(prompt_index)
            self.cache.make_room(sampling.max_completion_length)

    def _positions(self, width: int) -> dict[str, Tensor]:
        """Return attention mask and positions of the `width` next tokens; nothing if no prompt is padded."""
        if self.mask is None:
            return {}
        steps = torch.arange(width, device=self.position.device) - width  # [-width .. -1]
        return {"attention_mask": self.mask, "position_ids": (self.position[:, None] + steps).clamp(min=0)}

    def select(self, index: Tensor) -> None:
        """Make the rows `index` of everything that is held the new batch."""
        self.cache.select(index)
        self.logits, self.hidden = self.logits[index], self.hidden[index]
        self.position = self.position[index]
        self.mask = None if self.mask is None else self.mask[index]

    def advance(self, token: Tensor) -> None:
        """Feed each row its token, `token` [n], to get the logits of the next one."""
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        arguments = self.cache.arguments(self._positions(1))
        self._store(self.model(token[:, None], **arguments, **self.options))

    def _store(self, out: Any) -> None:
        """Store the cache, the last logits and the last hidden states of a forward pass."""
        self.cache = Cache.of(out)
        self.logits = out.logits[:, -1]
        self.hidden: Tensor = (
            out.hidden_states[-1][:, -1] if self.options["output_hidden_states"] else self.logits
        )


def _next_token(logits: Tensor, uniforms: Tensor | None, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token per row from logits [n, V] with uniforms [n], or greedily without them.

    Returns:
        The tokens [n]; a tensor [2, n] or [3, n] of their log-probabilities, the entropies of the
        distributions, and the squared norms of the scores if they are wanted; and the log-probabilities of
        all tokens [n, V].
    """
    logp = sampling.log_probabilities(logits)
    p = logp.exp()
    token = logp.argmax(dim=-1) if uniforms is None else draw(p, uniforms)
    chosen = logp.gather(1, token[:, None]).squeeze(1)
    norms = [score_norm_of(chosen, p)] if sampling.keep_score_norms else []
    return token, torch.stack([chosen, entropy_of(logp, p), *norms]), logp


def _on_device(uniforms: Tensor, device: torch.device) -> Tensor:
    """Return uniforms [N, T] as `draw` takes them: float64 on a CPU, whole numbers on a device."""
    if device.type == "cpu":
        return uniforms
    return (uniforms * 2**UNIFORM_BITS).long().to(device)


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting the CDF; a token of probability 0 is never drawn.

    With the rounding errors of float32, a CDF could draw another token, or one of probability 0 where a
    device adds in another order. So the sums are in float64 on a CPU. A device may have no float64; there the
    probabilities are whole numbers, whose sums are exact. For a large vocabulary a CPU converts only the sums
    of blocks, and the probabilities of one block per row.

    Args:
        p: probabilities [n, V].
        uniforms: random numbers in [0, 1) [n], in float64 or as whole numbers of 2**-UNIFORM_BITS.

    Returns:
        The tokens [n].
    """
    exact = not uniforms.is_floating_point()
    if exact:
        p = (p * 2**UNIT).long()
    vocabulary = p.shape[1]
    if vocabulary <= BLOCK:
        cdf = _cdf(p, uniforms)
        return _invert(cdf, _threshold(cdf[:, -1], uniforms))
    whole = vocabulary // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2)  # [n, blocks]
    if whole < vocabulary:
        sums = torch.cat([sums, p[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    cdf = _cdf(sums, uniforms)
    threshold = _threshold(cdf[:, -1], uniforms)
    block = _invert(cdf, threshold)
    inside = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)  # [n, BLOCK]
    values = torch.where(inside < vocabulary, p.gather(1, inside.clamp(max=vocabulary - 1)), 0)
    chosen = sums.gather(1, block[:, None]).to(uniforms.dtype).squeeze(1)
    rest = threshold - (cdf.gather(1, block[:, None]).squeeze(1) - chosen)
    cdf = _cdf(values, uniforms)
    if not exact:  # what is left of the uniform within its block is again uniform
        share = (rest / chosen).clamp(0, 1 - torch.finfo(uniforms.dtype).eps)
        rest = _threshold(cdf[:, -1], share)
    return block * BLOCK + _invert(cdf, rest)


def _cdf(p: Tensor, uniforms: Tensor) -> Tensor:
    return p.to(uniforms.dtype).cumsum(dim=1)


def _threshold(total: Tensor, uniforms: Tensor) -> Tensor:
    """Return the product of a CDF's total [n] and the uniforms [n], which is below the total."""
    if uniforms.is_floating_point():
        return uniforms * total  # rounding leaves the total near 1 and not at 1
    spare = UNIT - UNIFORM_BITS  # bits of the total that are left out, so that the product has 63 bits
    return ((total >> spare) * uniforms) >> (UNIFORM_BITS - spare)


def _invert(cdf: Tensor, threshold: Tensor) -> Tensor:
    """Return in each row the first entry [n] below whose end in the CDF [n, V] the threshold [n] lies."""
    # right=True finds the first entry above the threshold, so a token of probability 0 is never chosen.
    index = torch.searchsorted(cdf, threshold[:, None], right=True).squeeze(1)
    return index.clamp(max=cdf.shape[1] - 1)
