"""Holds sampled completions as tensors, in the record that generators fill and scoring reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

BY_ROW = (
    *("completion_ids", "mask", "sampling_logprobs", "truncated"),
    *("logprobs", "entropy", "score_norms", "hidden"),
)
"""Fields of a `Rollout` with one row per completion; all but `truncated` also have one column per token."""


@dataclass(frozen=True)
class Rollout:
    """Completions sampled from B prompts. The G rows of a prompt are consecutive, N = B * G in all.

    The last four fields are None if the generator did not return them; scoring computes them then.

    Attributes:
        prompt_ids: ids of the distinct prompts, padded on the left [B, P].
        prompt_mask: True on the tokens of the prompts, False on the padding [B, P].
        prompt_index: the number of the prompt that each row completes [N].
        completion_ids: sampled ids, padded on the right [N, T].
        mask: True on actions, which are the tokens up to and including the first EOS, or the
            first that completes a stop string [N, T].
        sampling_logprobs: log-probabilities under the distribution that was sampled from, as the generator
            reports them, 0 off the mask [N, T].
        truncated: True where the completion reached the length limit without an end [N].
        logprobs: log-probabilities under the policy that is trained, as it was then, 0 off the mask [N, T].
            An engine with kernels or weights of its own reports others, and a KL is the policy's.
        entropy: entropy in nats of the policy at each action, 0 off the mask [N, T].
        score_norms: squared norm of the score of each action in logit space, `1 - 2 p(a) + sum_v p(v)^2`, 0
            off the mask [N, T]. The optimal baselines weight rewards by it, as a cheap substitute for the
            norm in the space of the model's weights.
        hidden: the last hidden state before each action, 0 off the mask [N, T, H]. A critic reads it.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    prompt_index: Tensor
    completion_ids: Tensor
    mask: Tensor
    sampling_logprobs: Tensor
    truncated: Tensor
    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    score_norms: Tensor | None = None
    hidden: Tensor | None = None

    def rows(self, index: Tensor) -> Rollout:
        """Select the rows `index` [n] and their prompts, cut to the longest prompt and completion left."""
        used = torch.unique(self.prompt_index[index])
        prompt_index = torch.searchsorted(used, self.prompt_index[index])
        prompt_mask = self.prompt_mask[used]
        first = int(prompt_mask.int().argmax(dim=1).min())
        width = max(1, int(self.mask[index].sum(dim=1).max()))
        chosen = {name: x[index] for name in BY_ROW if (x := getattr(self, name)) is not None}
        return replace(
            self,
            prompt_ids=self.prompt_ids[used, first:],
            prompt_mask=prompt_mask[:, first:],
            prompt_index=prompt_index,
            **{name: x[:, :width] if x.ndim > 1 else x for name, x in chosen.items()},
        )


def pad_left(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad B lists of ids on the left to [B, P]; also returns the mask [B, P], True on the ids."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    mask = torch.arange(width, device=device) >= width - lengths[:, None]
    return ids, mask


def pad_right(x: Tensor, width: int) -> Tensor:
    """Pad a tensor [N, T, ...] with zeros on the right to [N, width, ...]."""
    return pad(x, (*(0, 0) * (x.ndim - 2), 0, width - x.shape[1]))


def joined(parts: Sequence[Rollout], index: Tensor | None = None) -> Rollout:
    """Concatenate rollouts, which have the same fields, and select the rows `index` of the result; None: all.

    The prompts of all are kept.
    """

    def rows(columns: list[Tensor]) -> Tensor:
        if columns[0].ndim > 1:  # completions are padded on the right
            width = max(x.shape[1] for x in columns)
            columns = [pad_right(x, width) for x in columns]
        whole = torch.cat(columns)
        return whole if index is None else whole[index]

    left = max(part.prompt_ids.shape[1] for part in parts)
    prompts = {
        name: torch.cat([pad(x, (left - x.shape[1], 0)) for x in (getattr(part, name) for part in parts)])
        for name in ("prompt_ids", "prompt_mask")
    }
    starts = accumulate((len(part.prompt_ids) for part in parts[:-1]), initial=0)
    places = [part.prompt_index + start for part, start in zip(parts, starts, strict=True)]
    by_row = {name: [getattr(part, name) for part in parts] for name in BY_ROW}
    chosen = {name: rows(columns) for name, columns in by_row.items() if columns[0] is not None}
    return replace(parts[0], **prompts, prompt_index=rows(places), **chosen)
