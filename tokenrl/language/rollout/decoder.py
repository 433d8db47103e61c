"""Reads prompts and samples token by token: the state of a batch of rows that are sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.drawing import draw
from tokenrl.language.rollout.head import last
from tokenrl.language.rollout.prefixes import Prefix, PrefixCache
from tokenrl.language.rollout.rollout import pad_left, to_device
from tokenrl.language.rollout.sampling import Sampling

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy


class _Prompt(NamedTuple):
    """A prompt, and what of it was read before.

    Attributes:
        ids: its tokens.
        prefix: the first of them, which were read; None if none were.
    """

    ids: Sequence[int]
    prefix: Prefix | None = None

    @property
    def unread(self) -> int:
        """How many tokens were not read."""
        return len(self.ids) - (self.prefix.length if self.prefix else 0)


class Last(NamedTuple):
    """What follows the last token of n rows.

    Attributes:
        logits: the logits of the next token [n, V].
        hidden: the last hidden states [n, H]; None if they are not needed.
    """

    logits: Tensor
    hidden: Tensor | None


class Decoder:
    """The model, its cache, and the logits of the next token for each row of the batch.

    Attributes:
        alive: True for the rows that have not ended [n].
        cache: the cache of the tokens that were fed to the model: all but the last one that was drawn.
        position: how many tokens of each row were fed to it [n].
        mask: True on these, and False on padding on their left [n, columns]; None without padding.
    """

    cache: Cache
    position: Tensor
    mask: Tensor | None
    logits: Tensor  # [n, V], of the next token
    hidden: Tensor | None  # [n, H], if `sampling` asks for it
    token: Tensor | None = None  # the last token that was drawn [n]

    def __init__(
        self,
        policy: Policy,
        prompts: Sequence[Sequence[int]],
        prompt_index: Tensor,
        sampling: Sampling,
        prefixes: PrefixCache | None,
        plain_cache: bool,
    ) -> None:
        """Read the prompts, and make each the rows of its group.

        Args:
            policy: the policy.
            prompts: ids of B prompts.
            prompt_index: the prompt of each row, on the CPU [n].
            sampling: how the rows are sampled.
            prefixes: what of the prompts was read before; None for nothing.
            plain_cache: whether the cache may only be handed back to the model.
        """
        self.model = policy.model
        self.sampling = sampling
        self.device = policy.device
        self.pad_id = policy.pad_id
        self.eos_ids = policy.eos_ids
        self.eos = torch.tensor(policy.eos_ids, device=self.device)
        self.alive = torch.ones(len(prompt_index), dtype=torch.bool, device=self.device)
        if plain_cache:
            prompts = [prompts[i] for i in prompt_index.tolist()]
            prompt_index = torch.arange(len(prompt_index))
        groups = [[_Prompt(ids) for ids in prompts]]
        if prefixes is not None:
            groups = _groups(prompts, prefixes)
            order = [prompt.ids for prompt in chain.from_iterable(groups)]
            numbers = {ids: number for number, ids in enumerate(order)}
            prompt_index = torch.tensor([numbers[tuple(prompts[i])] for i in prompt_index.tolist()])
            prompts = order
        index = to_device(prompt_index, self.device)
        parts = [self._read(group) for group in groups]
        if len(parts) == 1:
            self._store(*parts[0], index)
        else:
            self._place(prompts)
            rows = []
            for cache, _ in parts:
                columns = cache.columns
                rows += [(cache, row, columns) for row in range(cache.size)]
            longest = max(map(len, prompts))
            whole = Cache.joined(rows, longest, sampling.max_completion_length)
            self._store(whole, _joined([output for _, output in parts]), index)
        if not plain_cache:
            if not torch.equal(prompt_index, torch.arange(len(prompts))):
                self.select(index)
            self.cache.make_room(sampling.max_completion_length)

    def _place(self, prompts: Sequence[Sequence[int]]) -> None:
        """Store the mask and the position of the next token of prompts, padded on the left."""
        _, mask = pad_left(prompts, self.pad_id)
        # If no prompt is padded, no mask is passed, and attention can use a faster kernel.
        self.mask = None if mask.all() else to_device(mask, self.device)
        self.position = to_device(mask.sum(dim=1), self.device)  # [B]

    def _read(self, group: Sequence[_Prompt]) -> tuple[Cache, Last]:
        """Read what is new in some prompts; return their cache and what follows the last token.

        All rows read as many tokens as the row with most new ones, their last ones, so that no row has a gap.
        """
        rows = [prompt.ids for prompt in group]
        ids, _ = pad_left(rows, self.pad_id)
        self._place(rows)
        new = max(prompt.unread for prompt in group)
        width = ids.shape[1]
        arguments = self._positions(new)
        if new < width:
            read = []
            for ids_of_row, prefix in group:
                assert prefix is not None
                read_again = prefix.length - max(0, len(ids_of_row) - new)
                read.append((prefix.cache, prefix.row, prefix.end - read_again))
            room = new + self.sampling.max_completion_length
            cache = Cache.joined(read, width - new, room)
            arguments = cache.arguments(arguments)
        unread = to_device(ids[:, width - new :], self.device)
        keep = last(1, self.device)
        return forward(self.model, self.sampling, unread, **arguments, logits_to_keep=keep)

    def _positions(self, width: int) -> dict[str, Any]:
        """Return attention mask and positions of the `width` next tokens; nothing if no prompt is padded."""
        if self.mask is None:
            return {}
        steps = torch.arange(width, device=self.position.device) - width  # [-width .. -1]
        return {
            "attention_mask": self.mask,
            "position_ids": (self.position[:, None] + steps).clamp(min=0),
        }

    def sample(self, uniforms: Tensor | None, count: int) -> dict[str, Tensor]:
        """Sample the next tokens of each row, with uniforms [n, count] or greedily without them.

        Returns:
            `ids`, `mask` with True on tokens up to the end of their row, and the columns of a `Rollout`, each
            [n, count, ...].
        """
        tokens: dict[str, list[Tensor]] = {}
        for t in range(count):
            if self.token is not None:
                self._advance(self.token)
            of_token = None if uniforms is None else uniforms[:, t]
            numbers = drawn(self.sampling, self.logits, self.hidden, of_token)
            for name, x in {**numbers, "mask": self.alive}.items():
                tokens.setdefault(name, []).append(x)
            self.token = numbers["ids"]
            self.alive = self.alive & ~torch.isin(self.token, self.eos)
        return {name: torch.stack(columns, dim=1) for name, columns in tokens.items()}

    def end(self, ended: Tensor) -> None:
        """End the rows in which `ended` [n] is True."""
        self.alive = self.alive & ~ended

    def select(self, index: Tensor) -> None:
        """Make the rows `index` of the tokens that were read the new batch."""
        self.cache.select(index)
        self.position = self.position[index]
        if self.mask is not None:
            self.mask = self.mask[index]
        if self.token is not None:
            self.token = self.token[index]
            self.alive = self.alive[index]

    def _advance(self, token: Tensor) -> None:
        """Feed each row its token, `token` [n], to get the logits of the next one."""
        self.position = self.position + 1
        if self.mask is not None:
            self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=True)
        arguments = self.cache.arguments(self._positions(1))
        self._store(*forward(self.model, self.sampling, token[:, None], **arguments))

    def _store(self, cache: Cache, output: Last, index: Tensor | slice = slice(None)) -> None:
        """Store the cache, and of the rows `index` what the next token is drawn from."""
        self.cache = cache
        self.logits = output.logits[index]
        self.hidden = None if output.hidden is None else output.hidden[index]


def forward(
    model: nn.Module, sampling: Sampling, ids: Tensor, **arguments: Any
) -> tuple[Cache, Last]:
    """Feed tokens [n, t] to the model; return its cache and what follows the last token."""
    keep = sampling.keep_hidden
    out = model(ids, **arguments, use_cache=True, output_hidden_states=keep)
    hidden = out.hidden_states[-1][:, -1] if keep else None
    return Cache.of(out), Last(out.logits[:, -1], hidden)


def drawn(
    sampling: Sampling, logits: Tensor, hidden: Tensor | None, uniforms: Tensor | None
) -> dict[str, Tensor]:
    """Draw one token per row, and compute its columns of a `Rollout`; the host is not asked for anything.

    Args:
        sampling: the distribution, and which columns are kept.
        logits: the logits [n, V].
        hidden: the last hidden states [n, H]; None if they are not kept.
        uniforms: random numbers [n]; None to take the most probable token.

    Returns:
        The tokens, `ids` [n], and the columns [n, ...].
    """
    logp = sampling.log_probabilities(logits)
    p = logp.exp()
    token = logp.argmax(dim=-1) if uniforms is None else draw(p, uniforms)
    logprobs = logp.gather(1, token[:, None]).squeeze(1)
    numbers = {"ids": token, "logprobs": logprobs, "entropy": entropy_of(logp, p)}
    if sampling.keep_score_norms:
        numbers["score_norms"] = score_norm_of(logprobs, p)
    if hidden is not None:
        numbers["hidden"] = hidden
    if sampling.keep_distribution:
        numbers["sampling_distribution"] = logp
    if sampling.keep_top is not None:
        top = logp.topk(min(sampling.keep_top, logp.shape[1]))
        numbers |= {"sampling_distribution": top.values, "top_ids": top.indices}
    return numbers


def _groups(prompts: Sequence[Sequence[int]], prefixes: PrefixCache) -> list[list[_Prompt]]:
    """Return the distinct prompts, in groups that one forward pass reads, and drop what they continue.

    Those of a group have about as many new tokens, up to a factor of two; with recurrent states, which cannot
    leave padding out between tokens, exactly as many.
    """
    groups: dict[int, list[_Prompt]] = {}
    for ids in dict.fromkeys(map(tuple, prompts)):
        prompt = _Prompt(ids, prefixes.longest(ids))
        size = -1
        if prompt.prefix is not None:
            size = prompt.unread
            if not prompt.prefix.cache.recurrent:
                size = size.bit_length()
        groups.setdefault(size, []).append(prompt)
    distinct = list(chain.from_iterable(groups.values()))
    window = math.inf
    for prompt in distinct:
        if prompt.prefix is not None:
            prefixes.drop(prompt.ids, prompt.prefix.length)
            window = min(window, prompt.prefix.cache.window)
    longest = max(map(len, prompts))
    if len(groups) > 1 and longest >= window:
        # Layers with a window drop tokens now, and caches of several groups do not fit together.
        return [[_Prompt(prompt.ids) for prompt in distinct]]
    return list(groups.values())


def _joined(parts: Sequence[Last]) -> Last:
    """Put what follows the prompts of several groups one below the other."""
    hidden = [part.hidden for part in parts if part.hidden is not None]
    logits = torch.cat([part.logits for part in parts])
    return Last(logits, torch.cat(hidden) if hidden else None)
