"""Samples completions: the `Generator` protocol and its default, which samples from the policy's own model.

Tokens are drawn by inverting the CDF at uniform random numbers that are fixed by (stream, seed, step, prompt,
generation, position). A completion therefore depends neither on the other rows of its batch nor on the number
of processes, and two estimators can be compared on common random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.errors import Stopped
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.drawing import draw, on_device
from tokenrl.language.rollout.head import last
from tokenrl.language.rollout.rollout import Rollout, cat, pad_left, to_device, to_host, zeroed
from tokenrl.language.rollout.sampling import Sampling

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.policy.stops import StopStrings

LOOK_EVERY = 8
"""Tokens of a completion that a device samples between two looks at which rows are left. A look waits until
the device has computed all that it was given; rows that end before it are sampled on, and cut."""

NOT_FINITE = (
    "The model's logits are not finite while sampling: its weights have probably diverged. Lower the "
    "learning rate, or go back to an earlier checkpoint; with float16 try bfloat16."
)


@dataclass(frozen=True)
class Abilities:
    """What an engine can do. The class of an engine, or a function that makes one, holds it as `abilities`.

    Attributes:
        exact: its completions depend on the weights and on `draws` alone, so a run repeats bit for bit.
        agrees: it computes the trainer's probabilities up to rounding; a run refuses to start if it does not.
            Other engines may differ more (see `check_generator`), and a run warns of the difference.
        distributed: it samples in a run of several processes.
        min_p_last: with `top_p` and `min_p` it samples from the tokens that `Distribution` keeps.
        temperatures: the lowest and the highest temperature that it samples at.
    """

    exact: bool = True
    agrees: bool = False
    distributed: bool = True
    min_p_last: bool = True
    temperatures: tuple[float, float] = (0.0, math.inf)


def abilities_of(engine: Any) -> Abilities:
    """Return what an engine, its class or a function that makes it says that it can do."""
    abilities: Abilities = getattr(engine, "abilities", Abilities())
    return abilities


class Generator(Protocol):
    """An engine that samples completions. If it holds a copy of the weights, `sync` updates the copy.

    What an engine other than the default one returns is checked in each rollout, see `training.engines`. An
    engine that cannot do all that the default one can has an attribute `abilities`, see `Abilities`.
    """

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample `sampling.group_size` completions of each prompt.

        Args:
            prompt_ids: ids of B prompts, of any lengths.
            sampling: length limit, distribution of tokens, and number of completions per prompt.
            draws: uniforms [B * G, T] to draw the tokens with, or None for greedy completions. An engine that
                draws its own random numbers ignores their values, and only checks whether `draws` is None.

        Returns:
            A `Rollout` of N = B * G rows, which end at an EOS of the policy or where one of its stop strings
            is complete. `prompt_index` counts the prompts from 0. The columns `logprobs`, `entropy`,
            `score_norms` and `hidden` may be None; `scoring.with_missing_fields` computes those that are
            needed.
        """
        ...

    def sync(self, policy: Policy) -> None:
        """Sample from the weights of this policy from now on; called at the start and after each step."""
        ...

    def close(self) -> None:
        """Free memory and processes that the generator holds; nothing is sampled afterwards.

        An error in it is only a warning.
        """
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

        Only `score_norms`, `hidden`, `sampling_distribution` and `top_ids` are None unless `sampling` asks for
        them.

        Raises:
            Stopped: the model's logits are not finite.
        """
        size = sampling.group_size
        if draws is not None:
            draws = on_device(draws, self.policy.device)
        groups = len(prompt_ids)
        if self.rows_at_once is not None:
            groups = max(1, self.rows_at_once // size)
        modules = self.policy.model.modules()
        training = [m for m in modules if m.training]  # those that recompute, which keep no cache
        parts = []
        try:
            self.policy.model.eval()
            for start in range(0, len(prompt_ids), groups):
                end = start + groups
                uniforms = None if draws is None else draws[start * size : end * size]
                parts.append(_decode(self.policy, prompt_ids[start:end], sampling, uniforms, start))
        finally:
            for module in training:
                module.training = True
        return cat(parts)

    def sync(self, policy: Policy) -> None:
        """Do nothing, because the policy's own weights are sampled from."""

    def close(self) -> None:
        """Do nothing, because the generator has nothing to release."""


def _decode(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    draws: Tensor | None,
    first: int,  # number of the first prompt
) -> Rollout:
    """Sample token by token; the batch holds only unfinished rows and, for a while, a few finished ones."""
    device = policy.device
    length = sampling.max_completion_length
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id)
    prompt_index = torch.arange(len(prompts)).repeat_interleave(sampling.group_size)
    state = _Decoder(policy, prompt_ids, prompt_mask, prompt_index, sampling)
    tokens = _Tokens(len(prompt_index), length, policy)
    eos = torch.tensor(policy.eos_ids, device=device)
    rows = torch.arange(len(prompt_index), device=device)  # rows that are still in the batch
    alive = torch.ones_like(rows, dtype=torch.bool)  # True for those that are unfinished
    look_every = 1 if device.type == "cpu" else LOOK_EVERY
    unread = 0  # position of the first token that was not read at a look
    for t in range(length):
        uniforms = None if draws is None else draws[rows, t]
        token, numbers = state.draw(uniforms)
        tokens.write(t, rows, alive, token, numbers)
        alive = alive & ~torch.isin(token, eos)
        is_last = t + 1 == length
        is_look = is_last or (t + 1) % look_every == 0
        if is_look and policy.stops is not None:
            ended = _end_at_stops(policy.stops, tokens.ids, tokens.mask, unread, t)
            alive = alive & ~ended[rows]
            unread = t + 1
        if is_last:
            break
        if is_look:
            unfinished = _unfinished(alive, numbers["entropy"])
            if not len(unfinished):
                break
            # Copying the cache costs as much as keeping a few finished rows.
            if len(unfinished) <= 0.75 * len(rows) and not policy.plain_cache:
                index = to_device(unfinished, device)
                state.select(index)
                rows = rows[index]
                token = token[index]
                alive = alive[index]
        state.advance(token)
    columns: dict[str, Any] = {name: zeroed(x, tokens.mask) for name, x in tokens.numbers.items()}
    rollout = Rollout(
        prompt_ids=prompt_ids[prompt_index],
        prompt_mask=prompt_mask[prompt_index],
        prompt_index=first + prompt_index,
        completion_ids=tokens.ids.masked_fill(~tokens.mask, policy.pad_id),
        mask=tokens.mask,
        truncated=torch.zeros_like(tokens.mask[:, 0]).index_put((rows,), alive),
        sampling_logprobs=columns["logprobs"],
        **columns,
    ).on_host()
    if not rollout.entropy.isfinite().all():
        raise Stopped(NOT_FINITE)
    return rollout.cut(prompt_ids.shape[1], int(rollout.mask.any(dim=0).sum()))


class _Tokens:
    """The tokens of N completions that were drawn so far, with their numbers.

    Attributes:
        ids: the tokens [N, T].
        mask: True on the tokens up to the end of their completion, behind which rows may go on [N, T].
        numbers: columns of a `Rollout` by name [N, T] or [N, T, ...].
    """

    def __init__(self, rows: int, length: int, policy: Policy) -> None:
        self.ids = torch.full((rows, length), policy.pad_id, device=policy.device)
        self.mask = torch.zeros_like(self.ids, dtype=torch.bool)
        self.numbers: dict[str, Tensor] = {}

    def write(
        self, t: int, rows: Tensor, alive: Tensor, token: Tensor, numbers: Mapping[str, Tensor]
    ) -> None:
        """Write what was drawn at position t for some rows, some of which are still `alive`."""
        self.mask[rows, t] = alive
        self.ids[rows, t] = token
        for name, x in numbers.items():
            if t == 0:
                self.numbers[name] = x.new_zeros(*self.ids.shape, *x.shape[1:])
            self.numbers[name][rows, t] = x


def _end_at_stops(stops: StopStrings, ids: Tensor, mask: Tensor, start: int, end: int) -> Tensor:
    """Cut the mask behind stop strings that tokens from `start` to `end` complete.

    Args:
        stops: the stop strings.
        ids: ids of N completions [N, T].
        mask: True on their tokens so far, changed in place [N, T].
        start: position of the first token that was not looked at before.
        end: position of the last token.

    Returns:
        True for the rows that a stop string has ended [N].
    """
    host_ids, host_mask = to_host([ids, mask])
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for position in range(start, end + 1):
        rows = host_mask[:, position].nonzero().squeeze(1)
        over = rows[stops.ended(host_ids, rows, position)]
        ended[over] = True
        host_mask[over, position + 1 :] = False
    mask.copy_(host_mask)
    return to_device(ended, ids.device)


def _unfinished(alive: Tensor, entropy: Tensor) -> Tensor:
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
    hidden: Tensor  # [n, H], if `sampling` asks for it
    logp: Tensor  # [n, V], of the last token

    def __init__(
        self,
        policy: Policy,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        prompt_index: Tensor,
        sampling: Sampling,
    ) -> None:
        """Read the prompts, and make each the rows of its group."""
        self.model = policy.model
        self.sampling = sampling
        self.options = {"use_cache": True, "output_hidden_states": sampling.keep_hidden}
        if policy.plain_cache:
            prompt_ids = prompt_ids[prompt_index]
            prompt_mask = prompt_mask[prompt_index]
            prompt_index = torch.arange(len(prompt_index))
        width = prompt_ids.shape[1]
        # If no prompt is padded, no mask is passed, and attention can use a faster kernel.
        self.mask = None if prompt_mask.all() else to_device(prompt_mask, policy.device)
        # The position of the next token [B].
        self.position = to_device(prompt_mask.sum(dim=1), policy.device)
        ids = to_device(prompt_ids, policy.device)
        options = self._positions(width) | self.options
        out = self.model(ids, **options, logits_to_keep=last(1, policy.device))
        index = to_device(prompt_index, policy.device)
        self._store(out, index)
        if not policy.plain_cache:
            self.select(index)
            self.cache.make_room(sampling.max_completion_length)

    def _positions(self, width: int) -> dict[str, Any]:
        """Return attention mask and positions of the `width` next tokens; nothing if no prompt is padded."""
        if self.mask is None:
            return {}
        steps = torch.arange(width, device=self.position.device) - width  # [-width .. -1]
        return {
            "attention_mask": self.mask,
            "position_ids": (self.position[:, None] + steps).clamp(min=0),
        }

    def draw(self, uniforms: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw one token per row with uniforms [n], or greedily without them.

        Returns:
            The tokens [n], and their columns of a `Rollout`.
        """
        logp = self.sampling.log_probabilities(self.logits)
        self.logp = logp  # kept until the next token: freed memory takes time to get again
        p = logp.exp()
        token = logp.argmax(dim=-1) if uniforms is None else draw(p, uniforms)
        logprobs = logp.gather(1, token[:, None]).squeeze(1)
        numbers = {"logprobs": logprobs, "entropy": entropy_of(logp, p)}
        if self.sampling.keep_score_norms:
            numbers["score_norms"] = score_norm_of(logprobs, p)
        if self.sampling.keep_hidden:
            numbers["hidden"] = self.hidden
        if self.sampling.keep_distribution:
            numbers["sampling_distribution"] = logp
        if self.sampling.keep_top is not None:
            top = logp.topk(min(self.sampling.keep_top, logp.shape[1]))
            numbers |= {"sampling_distribution": top.values, "top_ids": top.indices}
        return token, numbers

    def select(self, index: Tensor) -> None:
        """Make the rows `index` of the tokens that were read the new batch."""
        self.cache.select(index)
        self.position = self.position[index]
        if self.mask is not None:
            self.mask = self.mask[index]

    def advance(self, token: Tensor) -> None:
        """Feed each row its token, `token` [n], to get the logits of the next one."""
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        arguments = self.cache.arguments(self._positions(1))
        self._store(self.model(token[:, None], **arguments, **self.options))

    def _store(self, out: Any, index: Tensor | slice = slice(None)) -> None:
        """Store the cache, and of the rows `index` the last logits and hidden states, of a forward pass."""
        self.cache = Cache.of(out)
        self.logits = out.logits[index, -1]
        if self.sampling.keep_hidden:
            self.hidden = out.hidden_states[-1][index, -1]
