"""Reads prompts and feeds tokens to the model: the state of a batch of rows that are sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.drawing import draw
from tokenrl.language.rollout.head import last
from tokenrl.language.rollout.prefixes import PrefixCache
from tokenrl.language.rollout.rollout import pad_left, to_device
from tokenrl.language.rollout.sampling import Sampling

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy


class _Prompt(NamedTuple):
    """A prompt, and how much of it was read before.

    Attributes:
        ids: its tokens.
        read: how many of them were read.
        cache: the cache of these; None if none were.
    """

    ids: Sequence[int]
    read: int = 0
    cache: Cache | None = None


class _Last(NamedTuple):
    """What follows the last token of n rows.

    Attributes:
        logits: the logits of the next token [n, V].
        hidden: the last hidden states [n, H]; None if they are not needed.
    """

    logits: Tensor
    hidden: Tensor | None


class Decoder:
    """The model, its cache, and the logits of the next token for each row of the batch."""

    logits: Tensor  # [n, V]
    hidden: Tensor  # [n, H], if `sampling` asks for it
    logp: Tensor  # [n, V], of the last token

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        prompt_index: Tensor,
        sampling: Sampling,
        prefixes: PrefixCache | None,
    ) -> None:
        """Read the prompts, and make each the rows of its group.

        Args:
            policy: the policy.
            prompts: ids of B prompts.
            prompt_index: the prompt of each row, on the CPU [n].
            sampling: how the rows are sampled.
            prefixes: what of the prompts was read before; None for nothing.
        """
        self.model = policy.model
        self.sampling = sampling
        self.device = policy.device
        self.pad_id = policy.pad_id
        if policy.plain_cache:
            prompts = [prompts[i] for i in prompt_index.tolist()]
            prompt_index = torch.arange(len(prompt_index))
        groups = [[_Prompt(ids) for ids in prompts]]
        if prefixes is not None:
            groups = _groups(prompts, prefixes)
            order = [prompt.ids for prompt in chain.from_iterable(groups)]
            numbers = {ids: number for number, ids in enumerate(order)}
            index_in_order = []
            for i in prompt_index.tolist():
                ids = tuple(prompts[i])
                index_in_order.append(numbers[ids])
            prompt_index = torch.tensor(index_in_order)
            prompts = order
        index = to_device(prompt_index, self.device)
        parts = [self._read(group) for group in groups]
        if len(parts) == 1:
            self._store(*parts[0], index)
        else:
            self._place(prompts)
            caches, outputs = zip(*parts, strict=True)
            widths = []
            for group in groups:
                lengths = [len(prompt.ids) for prompt in group]
                widths.append(max(lengths))
            whole = Cache.joined(caches, widths, sampling.max_completion_length)
            self._store(whole, _joined(outputs), index)
        if not policy.plain_cache:
            if not torch.equal(prompt_index, torch.arange(len(prompts))):
                self.select(index)
            self.cache.make_room(sampling.max_completion_length)

    def _place(self, prompts: Sequence[Sequence[int]]) -> None:
        """Store the mask and the position of the next token of prompts, padded on the left."""
        _, mask = pad_left(prompts, self.pad_id)
        # If no prompt is padded, no mask is passed, and attention can use a faster kernel.
        self.mask = None if mask.all() else to_device(mask, self.device)
        self.position = to_device(mask.sum(dim=1), self.device)  # [B]

    def _read(self, group: Sequence[_Prompt]) -> tuple[Cache, _Last]:
        """Read what is new in some prompts; return their cache and what follows the last token.

        All rows read as many tokens as the row with most new ones, their last ones, so that no row has a gap.
        """
        rows = [prompt.ids for prompt in group]
        ids, _ = pad_left(rows, self.pad_id)
        self._place(rows)
        new = max(len(prompt.ids) - prompt.read for prompt in group)
        width = ids.shape[1]
        arguments = self._positions(new)
        if new < width:
            lengths = [max(0, len(row) - new) for row in rows]
            caches = [prompt.cache for prompt in group if prompt.cache is not None]
            room = new + self.sampling.max_completion_length
            cache = Cache.joined(caches, lengths, room)
            arguments = cache.arguments(arguments)
        unread = to_device(ids[:, width - new :], self.device)
        return self._forward(unread, **arguments, logits_to_keep=last(1, self.device))

    def _forward(self, ids: Tensor, **arguments: Any) -> tuple[Cache, _Last]:
        """Feed tokens [n, t] to the model; return its cache and what follows the last token."""
        keep = self.sampling.keep_hidden
        out = self.model(ids, **arguments, use_cache=True, output_hidden_states=keep)
        hidden = out.hidden_states[-1][:, -1] if keep else None
        return Cache.of(out), _Last(out.logits[:, -1], hidden)

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
        self._store(*self._forward(token[:, None], **arguments))

    def _store(self, cache: Cache, output: _Last, index: Tensor | slice = slice(None)) -> None:
        """Store the cache, and of the rows `index` what the next token is drawn from."""
        self.cache = cache
        self.logits = output.logits[index]
        if output.hidden is not None:
            self.hidden = output.hidden[index]


def _groups(prompts: Sequence[Sequence[int]], prefixes: PrefixCache) -> list[list[_Prompt]]:
    """Return the distinct prompts, in groups that one forward pass reads, and drop what they continue.

    Those of a group have about as many new tokens, up to a factor of two; with recurrent states, which cannot
    leave padding out between tokens, exactly as many.
    """
    groups: dict[int, list[_Prompt]] = {}
    for ids in dict.fromkeys(map(tuple, prompts)):
        read, cache = prefixes.longest(ids)
        size = -1
        if cache is not None:
            new = len(ids) - read
            size = new if cache.recurrent else new.bit_length()
        groups.setdefault(size, []).append(_Prompt(ids, read, cache))
    distinct = list(chain.from_iterable(groups.values()))
    window = math.inf
    for prompt in distinct:
        prefixes.drop(prompt.ids, prompt.read)
        if prompt.cache is not None:
            window = min(window, prompt.cache.window)
    longest = max(map(len, prompts))
    if len(groups) > 1 and longest >= window:
        # Layers with a window drop tokens now, and caches of several groups do not fit together.
        return [[_Prompt(prompt.ids) for prompt in distinct]]
    return list(groups.values())


def _joined(parts: Sequence[_Last]) -> _Last:
    """Put what follows the prompts of several groups one below the other."""
    hidden = [part.hidden for part in parts if part.hidden is not None]
    logits = torch.cat([part.logits for part in parts])
    return _Last(logits, torch.cat(hidden) if hidden else None)
