"""Reads prompts, and of a history whose beginning was read before only what is new.

A turn of an episode begins with all tokens of the turns before it. The keys and values of these, and the
recurrent states where a model has them, are kept for each row until its next turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from tokenrl.language.rollout.cache import Cache, positions_of
from tokenrl.language.rollout.head import last
from tokenrl.language.rollout.rollout import mask_left, pad_left, to_device
from tokenrl.language.rollout.sampling import Sampling

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy


class Prefix(NamedTuple):
    """The first tokens of a history, which were read.

    Attributes:
        length: how many they are.
        cache: a cache in which one row is theirs.
        row: the number of this row.
        start: the column of the first of them.
    """

    length: int
    cache: Cache
    row: int
    start: int


class Histories:
    """What the rows of a batch of episodes have read, by their numbers in that batch.

    Attributes:
        limit: the most bytes that the caches take together; what does not fit is read again.
        rows: what each row has read.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.rows: dict[int, Prefix] = {}

    def take(
        self, numbers: Sequence[int], prompts: Sequence[Sequence[int]]
    ) -> dict[tuple[int, ...], Prefix | None]:
        """Return the distinct prompts of rows, each with what was read of it, which is kept no longer."""
        distinct: dict[tuple[int, ...], Prefix | None] = {}
        for number, ids in zip(numbers, prompts, strict=True):
            distinct.setdefault(tuple(ids), self.rows.pop(number, None))
        return distinct

    def add(
        self, cache: Cache, width: int, t: int, ended: Sequence[tuple[int, int, int, int]]
    ) -> None:
        """Copy what rows that have ended have read, if there is memory left.

        A row that reaches its limit of tokens has no end, and its episode goes no further: it is not kept.

        Args:
            cache: the cache of their batch.
            width: its columns of prompts.
            t: its columns of completions.
            ended: of each row, its row in the cache, its number, the tokens of its prompt, and the tokens of its
                completion but the last.
        """
        if cache.recurrent:  # the state of a row that ended earlier has gone beyond the end
            ended = [row for row in ended if row[3] == t]
        if not ended or not cache.keeps(width + t + 1):
            return
        longest = max(prompt for _, _, prompt, _ in ended)
        copies = Cache.joined([(cache, row, width + t) for row, *_ in ended], longest + t, 0)
        caches = {id(prefix.cache): prefix.cache for prefix in self.rows.values()}
        if copies.nbytes + sum(cache.nbytes for cache in caches.values()) > self.limit:
            return
        for row, (_, number, prompt, count) in enumerate(ended):
            self.rows[number] = Prefix(prompt + min(t, count), copies, row, longest - prompt)


class Last(NamedTuple):
    """What follows the last token of n rows.

    Attributes:
        logits: the logits of the next token [n, V].
        hidden: the last hidden states [n, H], or [n, 0] if they are not needed.
    """

    logits: Tensor
    hidden: Tensor

    def of(self, index: Tensor) -> Last:
        """Return what follows the rows `index`."""
        return Last(self.logits[index], self.hidden[index])


def forward(
    model: nn.Module, sampling: Sampling, ids: Tensor, **arguments: Any
) -> tuple[Cache, Last]:
    """Feed tokens [n, t] to the model; return its cache and what follows the last token."""
    keep = sampling.keep_hidden
    out = model(ids, **arguments, use_cache=True, output_hidden_states=keep)
    logits = out.logits[:, -1]
    return Cache.of(out), Last(logits, out.hidden_states[-1][:, -1] if keep else logits[:, :0])


def read(
    policy: Policy,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
) -> tuple[Cache, Last]:
    """Read what is new in B prompts; return the cache of all their tokens, and what follows each prompt.

    One forward pass reads those that have about as many new tokens, up to a factor of two; with recurrent
    states, which cannot leave padding out between tokens, exactly as many.

    Args:
        policy: the policy.
        sampling: how the prompts go on, which decides for how many tokens memory is set aside.
        prompts: ids of the prompts.
        prefixes: what of each was read before; None for nothing.
    """
    groups: dict[int, list[int]] = {}
    window = math.inf
    for number, prefix in enumerate(prefixes):
        size = -1
        if prefix is not None:
            window = min(window, prefix.cache.window)
            size = len(prompts[number]) - prefix.length
            if not prefix.cache.recurrent:
                size = size.bit_length()
        groups.setdefault(size, []).append(number)
    if len(groups) == 1:
        return _read(policy, sampling, prompts, prefixes)
    longest = max(map(len, prompts))
    if longest >= window:
        # Layers with a window drop tokens now, and caches of several groups do not fit together.
        return _read(policy, sampling, prompts, [None] * len(prompts))
    parts = []
    rows: dict[int, tuple[Cache, int, int]] = {}
    for group in groups.values():
        part = _read(policy, sampling, [prompts[i] for i in group], [prefixes[i] for i in group])
        parts.append(part)
        cache, _ = part
        rows |= {i: (cache, row, cache.columns) for row, i in enumerate(group)}
    in_order = [rows[i] for i in range(len(prompts))]
    cache = Cache.joined(in_order, longest, sampling.max_completion_length)
    columns = zip(*(following for _, following in parts), strict=True)
    return cache, Last(*map(torch.cat, columns)).of(
        to_device(torch.tensor([*rows]).argsort(), policy.device)
    )


def _read(
    policy: Policy,
    sampling: Sampling,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix | None],
) -> tuple[Cache, Last]:
    """Read what is new in some prompts, in one forward pass.

    The first tokens of all prompts were read before, or those of none. Each row reads its last n tokens, n the most
    unread tokens of a row, so that no row has a gap.
    """
    ids, _ = pad_left(prompts, policy.pad_id)
    mask, _ = padding(policy, prompts)
    width = new = ids.shape[1]
    arguments = positions_of(mask, width)
    rows = [(len(ids), prefix) for ids, prefix in zip(prompts, prefixes, strict=True) if prefix]
    if rows:
        new = max(count - prefix.length for count, prefix in rows)
        before = [(x.cache, x.row, x.start + max(0, count - new)) for count, x in rows]
        cache = Cache.joined(before, width - new, new + sampling.max_completion_length)
        arguments = cache.arguments(positions_of(mask, new))
    unread = to_device(ids[:, width - new :], policy.device)
    keep = last(1, policy.device)
    return forward(policy.model, sampling, unread, **arguments, logits_to_keep=keep)


def padding(policy: Policy, prompts: Sequence[Sequence[int]]) -> tuple[Tensor | None, Tensor]:
    """Return a mask of prompts [B, P] on the device, if any is padded, and how many tokens each has [B]."""
    mask = mask_left(prompts)
    # If no prompt is padded, no mask is passed, and attention can use a faster kernel.
    padded = None if mask.all() else to_device(mask, policy.device)
    return padded, to_device(mask.sum(dim=1), policy.device)
