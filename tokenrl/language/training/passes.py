"""Plans the backward passes of an update: which rows are computed together.

In a pass every row costs as many tokens as the longest one has, so rows of like lengths are computed
together where that leaves out much padding. But each pass takes some time of its own, and computes the
prompts of its rows again, unless it belongs to a block of passes that share their prompts.

Each process makes the same number of passes, because the gradients are averaged over processes in the last of
them: a process without one would hang the others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

FIXED = {torch.float32: (768, 320, 110), torch.bfloat16: (1_000, 1_000, 400)}
"""Tokens that could be computed in the time that a pass takes beside its tokens, with fewer parameters than
each of `SIZES`, and with more. Measured on two processors. In float32: 720 to 765 with 60,000 parameters,
280 to 390 with 0.8 M, 140 with 3 M, 100 to 140 with 11 M, 110 with 32 M. In bfloat16, where tokens take less
time: 720 to 950 with 0.8 M, 610 to 760 with 3 M, 340 to 490 with 11 M, 260 to 410 with 32 M."""
SIZES = (1_000_000, 10_000_000)
"""Numbers of parameters."""
ON_GPU = 16_384
"""As `FIXED`, on a GPU; not measured."""
LESS = 0.9
"""Rows are sorted if that leaves a smaller share of the work than this; it rounds sums in another order."""

Block = list[np.ndarray]
"""Rows of each pass of a block."""


def fixed_cost(parameters: int, dtype: torch.dtype, device: str) -> int:
    """Return the tokens that could be computed in the time that a pass takes beside its tokens.

    Args:
        parameters: number of the model's parameters.
        dtype: of the parameters.
        device: type of the device, such as `cpu`.
    """
    if device != "cpu":
        return ON_GPU
    return FIXED.get(dtype, FIXED[torch.float32])[bisect_right(SIZES, parameters)]


class Lengths(NamedTuple):
    """What the rows of a step cost in a pass.

    Attributes:
        completions: tokens of the completion of each row [N].
        prompt: tokens of a prompt, which a pass computes once for all its rows of that prompt; 0 where it
            computes it for each row, however they are divided.
        group: rows of a prompt, which follow one another.
        fixed: tokens that a pass costs besides.
        shared: whether the passes of a block may share the prompts of their rows.
    """

    completions: Tensor
    prompt: int
    group: int
    fixed: int
    shared: bool = False


def equal_passes(accelerator: Any, active: Tensor, size: int | None, lengths: Lengths) -> list[list[Tensor]]:
    """Divide this process's active rows into backward passes; every process gets the same number of passes.

    Args:
        accelerator: accelerate's handle of the processes.
        active: True for the rows of the step that are computed [N], the same on every process.
        size: maximum number of rows in a pass; None for all that a process has.
        lengths: what the rows cost, the same on every process. Prompts are shared by one process alone.

    Returns:
        For each block, for each of its passes, the indices of its rows among this process's own; empty for a
        pass in which only other processes have work.
    """
    world = accelerator.num_processes
    by_process = zip(*(x.view(world, -1).cpu().numpy() for x in (active, lengths.completions)), strict=True)
    plans = [_divided(chosen.nonzero()[0], tokens, size, lengths) for chosen, tokens in by_process]
    mine = plans[accelerator.process_index]
    mine += [[np.empty(0, dtype=np.int64)]] * (max(map(len, plans)) - len(mine))
    return [[torch.from_numpy(rows).to(active.device) for rows in block] for block in mine]


def _divided(rows: np.ndarray, tokens: np.ndarray, size: int | None, lengths: Lengths) -> list[Block]:
    """Divide some rows of a process into passes: as they come, or in the way that costs clearly less.

    Args:
        rows: indices of rows.
        tokens: tokens of the completions of all rows of the process.
        size: maximum number of rows in a pass.
        lengths: what else they cost.
    """
    size = size or max(1, len(rows))
    as_they_come = [[rows[k : k + size]] for k in range(0, len(rows), size)]
    best, least = as_they_come, LESS * _cost(as_they_come, tokens, lengths)
    for plan in _others(rows, tokens, size, lengths) if len(rows) else ():
        cost = _cost(plan, tokens, lengths)
        if cost < least:
            best, least = plan, cost
    return best


def _others(rows: np.ndarray, tokens: np.ndarray, size: int, lengths: Lengths) -> Iterator[list[Block]]:
    """Yield other ways to divide rows: all sorted by length, and those of some prompts after the other."""
    whole = tokens[rows].sum()
    padded = tokens[rows].max() * len(rows) - whole > (1 - LESS) * whole
    if padded:
        yield [[part] for part in _sorted(rows, tokens[rows], size, lengths)]
    if lengths.shared and len(rows) > size:  # else nothing is gained: a further pass takes what is saved
        parts, once = _of_prompts(rows, size, lengths.group), lengths._replace(prompt=0)
        yield [_sorted(part, tokens[part], size, once) for part in parts]


def _of_prompts(rows: np.ndarray, size: int, group: int) -> Iterator[np.ndarray]:
    """Yield rows of some prompts: as many prompts as one pass could take, at least one."""
    cuts = np.flatnonzero(np.diff(rows // group)) + 1  # where the rows of another prompt begin
    begin = last = 0
    for cut in (*cuts.tolist(), len(rows)):
        if cut - begin > size and last > begin:
            yield rows[begin:last]
            begin = last
        last = cut
    yield rows[begin:]


def _sorted(rows: np.ndarray, tokens: np.ndarray, size: int, lengths: Lengths) -> Block:
    """Return the division of rows with these tokens into ranges of lengths that costs least, longest first.

    The least cost of all rows up to a length is found from those of shorter ones.
    """
    longest, counts = np.unique(tokens, return_counts=True)
    ends = counts.cumsum()
    starts = ends - counts
    prompts = len(np.unique(rows // lengths.group))
    least, begins = np.zeros(len(longest) + 1), []
    for k, (top, end) in enumerate(zip(longest, ends, strict=True)):
        count = end - starts[: k + 1]  # rows of a range that begins at each shorter length, or here
        each = lengths.fixed + lengths.prompt * np.minimum(np.minimum(count, size), prompts)
        costs = least[: k + 1] + count * top + -(-count // size) * each
        begins.append(int(costs.argmin()))
        least[k + 1] = costs.min()
    order, plan, k = rows[tokens.argsort(kind="stable")], [], len(longest)
    while k:
        begin = begins[k - 1]
        part = order[starts[begin] : ends[k - 1]]
        plan += [np.sort(rows) for rows in np.array_split(part, -(-len(part) // size))[::-1]]
        k = begin
    return plan


def _cost(plan: list[Block], tokens: np.ndarray, lengths: Lengths) -> int:
    """Return the tokens that a plan costs."""
    prompts = sum(len(np.unique(np.concatenate(block) // lengths.group)) for block in plan)
    passes = sum(len(rows) * int(tokens[rows].max()) + lengths.fixed for block in plan for rows in block)
    return prompts * lengths.prompt + passes
