"""Holds completions in a table: each column has an entry for every completion.

A step makes three tables, each of which is complete when it is made: a `Rollout` of what was sampled, a `Rewarded`
with the rewards, and an `Experience` of what the update learns from. The two later ones are also a `Rollout`.

The table lies on the CPU, but for columns with three dimensions, whatever device the model is on. A forward
pass copies the rows that it needs to the device. What is read back from a device has to wait until the device
has computed all that it was given, so it is read in one transfer (`to_host`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

Table = TypeVar("Table", bound="Rollout")


class Column(NamedTuple):
    """Declares the tensors of a column of a `Rollout`.

    Attributes:
        axes: a letter for each axis: N rows, P tokens of the prompt, T tokens of the completion. Along P the rows
            are padded on the left, along T on the right.
        dtype: the type of its numbers; an engine may return a wider or a narrower one of the same kind.
        low: the least number at an action; None where any may stand.
        high: the largest number at an action; ids of tokens also end with the vocabulary.
    """

    axes: str
    dtype: torch.dtype
    low: float | None = None
    high: float = math.inf


COLUMNS = {
    "prompt_ids": Column("NP", torch.int64),
    "prompt_mask": Column("NP", torch.bool),
    "prompt_index": Column("N", torch.int64),
    "completion_ids": Column("NT", torch.int64, 0),
    "mask": Column("NT", torch.bool),
    "sampling_logprobs": Column("NT", torch.float32, -1000, 0),  # less is never sampled
    "truncated": Column("N", torch.bool),
}
"""The columns of a `Rollout` that an engine fills."""
OF_PROMPTS = [name for name, column in COLUMNS.items() if "P" in column.axes]
OF_ROWS = ("by_function",)
"""Columns of two dimensions whose second is not the tokens of the completion."""
ABSENT: Any = None
"""Stands in a column that an engine does not report, or that rows of a single turn do not have."""


@dataclass(frozen=True)
class Rollout:
    """A table of N completions, as a generator has sampled them. The G rows of a prompt are consecutive.

    An engine fills the columns down to `truncated`; the trainer scores what else it needs
    (`with_missing_fields`). The columns from `turns` on are None without an environment. T
    is the longest completion, P the longest prompt. Off the mask the columns of tokens are 0.

    Attributes:
        prompt_ids: ids of each row's prompt, padded on the left [N, P].
        prompt_mask: True on the tokens of the prompts, False on the padding [N, P].
        prompt_index: number of each row's prompt in the data, or in the list given to the generator [N]; below 0 for
            rows that somebody else sampled.
        completion_ids: sampled ids, padded on the right [N, T].
        mask: True on actions, which are the tokens up to and including the first EOS, or the
            first that completes a stop string [N, T]. Of several turns, the tokens of every turn; the tokens
            of the environment between them are no actions.
        sampling_logprobs: log-probabilities under the distribution that was sampled from, as the generator
            reports them [N, T].
        truncated: True where the completion, or its episode, reached a limit without an end [N].
        allowed_keys: where a rule says which tokens are allowed, the key of the position of each action [N, T], see
            `AllowedTokens`; else None.
        sampling_distribution: log-probabilities of all tokens under the distribution that was sampled from
            [N, T, V], for centred scores. The default generator fills it.
        logprobs: log-probabilities under the policy that is trained, as it was then [N, T].
            An engine with other kernels or weights reports others, and a KL is the policy's.
        entropy: entropy in nats of the policy at each action [N, T].
        score_norms: squared norm of the score of each action in logit space, `1 - 2 p(a) + sum_v p(v)^2`
            [N, T]. The optimal baselines weight rewards by it, as a cheap substitute for the norm in the
            space of the model's weights.
        hidden: the last hidden state before each action [N, T, H]. A critic reads it.
        turns: number of the turn of each action, from 0 [N, T].
        turn_rewards: rewards of the environment at the last action of their turn [N, T].
        messages: what the policy and the environment wrote, N lists of chat messages.
        endings: how each episode ended, N names of `ENDINGS`.
        failures: what failed in each episode, N texts, empty without a failure.
        environments: the environment of each episode, N objects.
        openings: what the policy read first of each episode: N pairs of a prompt, text or chat messages, and of
            tools, as `Policy.encode` takes them.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompt_index: Tensor
    completion_ids: Tensor
    mask: Tensor
    sampling_logprobs: Tensor
    truncated: Tensor
    allowed_keys: Tensor = ABSENT
    sampling_distribution: Tensor = ABSENT
    logprobs: Tensor = ABSENT
    entropy: Tensor = ABSENT
    score_norms: Tensor | None = None
    hidden: Tensor | None = None
    turns: Tensor = ABSENT
    turn_rewards: Tensor = ABSENT
    messages: Sequence[Sequence[Mapping[str, Any]]] = ABSENT
    endings: Sequence[str] = ABSENT
    failures: Sequence[str] = ABSENT
    environments: Sequence[Any] = ABSENT
    openings: Sequence[tuple[Any, Any]] = ABSENT

    def __len__(self) -> int:
        """Return N."""
        return len(self.mask)

    def columns(self) -> dict[str, Any]:
        """Return the columns that are filled, by name."""
        columns = vars(self).items()
        return {name: x for name, x in columns if x is not None and name != "logged"}

    def tensors(self) -> dict[str, Tensor]:
        """Return the columns that are tensors, by name."""
        return {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}

    def of_tokens(self) -> dict[str, Tensor]:
        """Return the columns [N, T, ...] with numbers for each token of the completions, by name."""
        others = (*OF_PROMPTS, *OF_ROWS)
        return {name: x for name, x in self.tensors().items() if x.ndim > 1 and name not in others}

    def on_host(self: Table) -> Table:
        """Return the table on the CPU, but for columns with three dimensions, in one transfer."""
        host: dict[str, Any] = small_on_host(self.tensors())
        return replace(self, **host)

    def take(self: Table, index: Tensor) -> Table:
        """Select the rows `index` [n], cut to their longest prompt and completion."""
        columns = self.columns()
        for name, x in columns.items():
            if isinstance(x, Tensor):
                columns[name] = x[index.to(x.device)]
            else:
                columns[name] = [x[i] for i in index.tolist()]
        rows = replace(self, **columns)
        return rows.cut(int(rows.prompt_mask.sum(dim=1).max()), int(lengths(rows.mask).max()))

    def cut(self: Table, P: int, T: int) -> Table:
        """Cut or pad the columns to P tokens of the prompts and T of the completions, each at least 1."""
        tokens: dict[str, Any] = {
            name: pad_right(x, max(1, T)) for name, x in self.of_tokens().items()
        }
        missing = max(1, P) - self.prompt_ids.shape[1], 0
        ids = pad(self.prompt_ids, missing)
        return replace(self, prompt_ids=ids, prompt_mask=pad(self.prompt_mask, missing), **tokens)

    def behind(self: Table, prompts: Sequence[Sequence[int]], pad_id: int) -> Table:
        """Return the same completions behind other prompts, given by the ids of the N prompts."""
        ids, mask = pad_left(prompts, pad_id)
        return replace(self, prompt_ids=ids, prompt_mask=mask)

    def distinct_prompts(self) -> tuple[Tensor, Tensor]:
        """Return the first row of each of B prompts [B], and which of these prompts each row has [N]."""
        # Environments may begin the rows of a prompt in several ways.
        prompts = torch.cat([self.prompt_index[:, None], self.prompt_ids], dim=1)
        _, prompt, counts = torch.unique_consecutive(
            prompts, return_inverse=True, return_counts=True, dim=0
        )
        first_row = counts.cumsum(0) - counts
        return first_row, prompt


def cat(parts: Sequence[Table]) -> Table:
    """Put tables with the same columns one below the other; what is no column is that of the first."""
    if len(parts) == 1:
        return parts[0]
    P = max(part.prompt_ids.shape[1] for part in parts)
    T = max(part.mask.shape[1] for part in parts)
    tables = [part.cut(P, T).columns() for part in parts]
    columns = dict[str, Any]()
    for name, first in tables[0].items():
        column = [table[name] for table in tables]
        columns[name] = torch.cat(column) if isinstance(first, Tensor) else [*chain(*column)]
    return replace(parts[0], **columns)


def lengths(mask: Tensor) -> Tensor:
    """Return the number of tokens of each row up to the last action [N], of a mask [N, T]."""
    numbers = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * numbers).amax(dim=1)


def to_host(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copy tensors of any shapes and types to the CPU, in one transfer; those that are there stay there."""
    tensors = [*map(Tensor.detach, tensors)]
    away = [x for x in tensors if not x.is_cpu]
    if not away:
        return tensors
    sizes = [x.numel() * x.element_size() for x in away]
    flat = torch.cat([x.reshape(-1).view(torch.uint8) for x in away]).cpu()
    # A copy of each, because memory has to begin at a multiple of the size of the numbers in it.
    parts = iter(flat.split(sizes))
    return [x if x.is_cpu else next(parts).clone().view(x.dtype).view(x.shape) for x in tensors]


def small_on_host(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the columns that have fewer than three dimensions on the CPU, by name, in one transfer."""
    small = {name: x for name, x in columns.items() if x.ndim < 3}
    return dict(zip(small, to_host(small.values()), strict=True))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the CPU to a device, without waiting for what CUDA still has to compute."""
    return x.to(device, non_blocking=device.type == "cuda")


def zeroed(x: Tensor, mask: Tensor) -> Tensor:
    """Return the numbers of tokens [N, T, ...] with 0 off the mask [N, T]."""
    off = to_device(~mask, x.device)
    return x.masked_fill(off.view(*off.shape, *[1] * (x.ndim - 2)), 0)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad B lists of ids on the left to [B, P]; also returns the mask [B, P], True on the ids."""
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    options: dict[str, Any] = {"batch_first": True, "padding_side": "left"}
    return pad_sequence(ids, padding_value=pad_id, **options), mask_left(rows)


def mask_left(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the mask of B lists of ids that are padded on the left [B, P], True on the ids."""
    counts = torch.tensor([*map(len, rows)])
    width = int(counts.max())
    return torch.arange(width) >= width - counts[:, None]


def pad_right(x: Tensor, width: int) -> Tensor:
    """Pad a tensor [N, T, ...] with zeros on the right to [N, width, ...], or cut it to that."""
    later_axes = [0, 0] * (x.ndim - 2)
    return pad(x, [*later_axes, 0, width - x.shape[1]])
