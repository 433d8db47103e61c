"""Chooses how many completions are sampled, and how many differentiated, at once: as many as memory allows.

The numbers change only the memory that a run takes. What a completion costs is measured on one or two of
them, as long as the run's may become, by counting the tensors that live at the same time.
"""

from __future__ import annotations

import contextlib
import heapq
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenrl.errors import Refused
from tokenrl.language.policy.model import with_cache
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.head import LOGITS, last
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training.forward import SMALL, make_up
from tokenrl.language.training.update import Learner
from tokenrl.runs.space import in_words
from tokenrl.runs.timings import free_memory

SHARE = 0.8
"""Of the free memory, what is planned with: freed memory comes back in pieces, and costs are estimates."""
CANDIDATES = 32
"""Prompts, those of the longest texts, among which the one of most tokens is looked for."""
DRAWN = 24
"""Bytes for each word of the vocabulary while a token is drawn: its logit, its probability, and so on."""


class Cost(NamedTuple):
    """Bytes that some completions take at once."""

    group: int
    """Of each prompt."""
    row: int
    """Of each completion."""
    fixed: int = 0
    """However many there are."""

    def of(self, rows: int, size: int) -> int:
        """Return the bytes of rows in groups of a size."""
        return self.fixed + -(-rows // size) * self.group + rows * self.row

    def most(self, free: int, rows: int, size: int) -> int:
        """Return how many of the rows fit: whole groups if one fits, and at least one row."""
        if self.of(rows, size) <= free:
            return rows
        groups = (free - self.fixed) // max(1, self.group + size * self.row)
        if groups >= 1:
            return min(rows, groups * size)
        return max(1, min(rows, size, (free - self.fixed - self.group) // max(1, self.row)))


def settle_memory(learner: Learner, prompts: Sequence[Mapping[str, Any]]) -> None:
    """Choose `micro_batch_size` and `sampling_batch_size` where they are left open and not all rows fit.

    Nothing is measured for a model below 1 M parameters. Whatever is chosen is written into the learner's
    settings and generator, and into `policy.remarks`.

    Args:
        learner: the learner, whose weights and gradients stay as they are.
        prompts: all training prompts.
    """
    args, policy, accelerator = learner.args, learner.forward.policy, learner.accelerator
    size, processes = learner.sampling.group_size, accelerator.num_processes
    rows = args.prompts_per_step // processes * size
    if policy.size < SMALL:
        return
    width = _longest(learner, prompts)
    free = int(SHARE * free_memory(policy.device)) // (processes if policy.device.type == "cpu" else 1)
    chosen = {}
    if args.micro_batch_size is None:
        chosen["micro_batch_size"] = update_cost(learner, width)
    if args.sampling_batch_size is None and isinstance(learner.generator, TransformersGenerator):
        chosen["sampling_batch_size"] = sampling_cost(learner, width)
    if not chosen:
        return
    most = torch.tensor([[cost.most(free, rows, size) for cost in chosen.values()]], device=policy.device)
    found = dict(zip(chosen, accelerator.gather(most).amin(dim=0).tolist(), strict=True))
    less = {name: number for name, number in found.items() if number < rows}
    if not less:
        return
    learner.args = replace(args, **less)
    if "sampling_batch_size" in less:
        slices = {"rows_at_once": less["sampling_batch_size"]}
        learner.generator = replace(learner.generator, **slices)  # type: ignore[type-var]
    what = {"micro_batch_size": "differentiated", "sampling_batch_size": "sampled"}
    learner.policy.remarks["memory"] = (
        ", ".join(f"{number} completions {what[name]} at once" for name, number in less.items())
        + f" (all {rows} would take {in_words(max(chosen[name].of(rows, size) for name in less))}, and "
        f"{in_words(free)} can be used)"
    )


def update_cost(learner: Learner, width: int) -> Cost:
    """Measure what completions take in an update: the tensors of a forward pass that is to be differentiated.

    Args:
        learner: the learner.
        width: tokens of the prompts.
    """
    policy, length, scoring = learner.forward.policy, _length(learner, width), learner.scoring
    chunk = scoring["tokens_at_once"]
    if chunk is not None:  # so few rows would have all their logits at once
        scoring["tokens_at_once"] = min(chunk, max(1, length - 1))

    def peak(rows: int) -> int:
        rollout = make_up(policy, rows, rows, width, length)
        return most_bytes(lambda: score(learner.model, rollout, **scoring))

    one, two = peak(1), peak(2)
    gradients = bytes_of(learner.policy.trainable_parameters())
    if learner.forward.half is not None:  # the copy has a gradient too
        gradients += bytes_of(policy.trainable_parameters())
    fixed = gradients + moments_of(learner) + 2 * 4 * LOGITS
    return Cost(max(0, 2 * one - two), max(1, two - one), fixed)


@torch.no_grad()
def sampling_cost(learner: Learner, width: int) -> Cost:
    """Measure what completions take while they are sampled: a pass over each prompt, a cache for each row.

    Args:
        learner: the learner.
        width: tokens of the prompts.
    """
    policy, length = learner.forward.policy, _length(learner, width)
    ids, held = make_up(policy, 1, 1, width, length).prompt_ids, []
    with with_cache(policy.model):
        kept = last(1, ids.device)
        group = most_bytes(lambda: held.append(policy.model(ids, use_cache=True, logits_to_keep=kept)))
    layers = getattr(Cache.of(held[0]).held, "layers", [])
    cached = sum(x.nbytes for x in tree_leaves([vars(layer) for layer in layers]) if isinstance(x, Tensor))
    row = (width + length) * cached // width + DRAWN * held[0].logits.shape[-1]
    return Cost(group, row, moments_of(learner))


def most_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that tensors made by some work took at the same time."""
    live = _Live()
    with live:
        work()
    return live.most


class _Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:  # else a view, or in place
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _longest(learner: Learner, prompts: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of tokens of the longest prompt that can be asked; others are refused elsewhere."""
    policy, found = learner.policy, 1
    texts = (row["prompt"] for row in prompts)
    for prompt in heapq.nlargest(CANDIDATES, texts, key=lambda text: len(str(text))):
        with contextlib.suppress(Refused):
            found = max(found, len(policy.encode(prompt)))
    return found if policy.context is None else max(1, min(found, policy.context - 1))


def _length(learner: Learner, width: int) -> int:
    """Return how long a completion may become."""
    context = learner.policy.context or 10**9
    return max(1, min(learner.args.max_completion_length, context - width))


def moments_of(learner: Learner) -> int:
    """Return the bytes that the optimiser keeps beside the weights: AdamW two numbers, SGD none."""
    return (2 if learner.args.optimizer == "adamw" else 0) * bytes_of(learner.policy.trainable_parameters())


def bytes_of(parameters: Sequence[torch.nn.Parameter]) -> int:
    """Return the bytes of weights, which their gradient takes too."""
    return sum(p.nbytes for p in parameters)
