"""Says how passes with a gradient are computed, and divides rows into passes by their shapes alone.

All completions of a pass are computed to the length of its longest, and all prompts to the width of its widest.
Passes of rows with similar lengths compute less padding, but starting a pass takes time. The rule counts this
time in tokens, and chooses the division that costs the fewest tokens in all. Nothing is timed in a run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokenrl.settings import MAX_COUNT

# weights of a policy, each with its bfloat16 copy
Copies = Sequence[tuple[nn.Parameter, nn.Parameter]]
Shapes = Sequence[Sequence[int]]
"""Three numbers for each of n rows [3, n]: the columns of its completion up to the last action, the tokens of its
prompt, and the number of its group. Groups ascend; a pass computes the prompt of a group once."""


@dataclass(frozen=True, kw_only=True)
class Passes:
    """How passes with a gradient are computed.

    Attributes:
        model: the model that computes them, in bfloat16 a copy of the one that is trained.
        copies: the trained weights, each with the bfloat16 copy that `model` has of it; empty in float32.
        words: the choices and their reasons in a line, for the run's header.
        tokens_per_pass: the most tokens of a pass, which has at least one row.
        pass_overhead: number of tokens that take as long to compute as a pass takes to start.
    """

    model: nn.Module
    copies: Copies = ()
    words: str = ""
    tokens_per_pass: int = 1
    pass_overhead: int = MAX_COUNT

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Copy the trained weights, as they are after an update, into the bfloat16 copy."""
        for original, half in self.copies:
            half.copy_(original)

    def accumulate_gradients(self) -> None:
        """Add the gradients of the copy to those of the trained weights, in float32, and clear them."""
        for original, half in self.copies:
            if half.grad is not None:
                grad = half.grad.to(original.dtype)
                original.grad = grad if original.grad is None else original.grad.add_(grad)
                half.grad = None

    def divide(self, shapes: Shapes, rows: int | None) -> list[Any]:
        """Divide rows into passes at the least cost.

        The cost is the number of tokens that are computed, with padding, and the overhead of each pass. A pass
        takes consecutive rows in one of two orders: rows by their completion, or whole groups by their longest
        completion, to which all their rows are taken to be computed. The order that costs less is chosen. Of many
        rows, each 16th of those that fit into a pass stays together, so that the choice takes little time.

        Args:
            shapes: the shapes of n rows.
            rows: the most rows of a pass; None for any number.

        Returns:
            For each pass the list of the numbers of its rows, ascending; nothing if there are no rows. Groups, or rows,
            with the longest completions come first.
        """
        lengths, prompts, groups = shapes
        n = len(groups)
        most = rows or n
        widest = max(lengths, default=1) + max(prompts, default=0)
        step = max(1, min(most, n, self.tokens_per_pass // widest) // 16)
        longest = dict(sorted(zip(groups, lengths, strict=True)))
        plans = []
        for columns in ([longest[group] for group in groups], lengths):
            order = sorted(range(n), key=columns.__getitem__, reverse=True)
            best: dict[int, Any] = {0: (0, [])}  # least cost and passes of the first rows
            for end in [*range(step, n, step), n][:n]:
                least: Any = (math.inf, [])
                members = set[int]()  # the groups of the rows from start to end
                width = 0
                joined = end
                for start in reversed(best):
                    for i in order[start:joined]:
                        members.add(groups[i])
                        width = max(width, prompts[i])
                    joined = start
                    count = end - start
                    tokens = len(members) * width + count * columns[order[start]]
                    if least[1] and (tokens > self.tokens_per_pass or count > most):
                        break
                    cost, parts = best[start]
                    cost += tokens + self.pass_overhead
                    if cost <= least[0]:
                        least = min(least, (cost, [*parts, sorted(order[start:end])]))
                best[end] = least
            plans.append(best[n])
        return min(plans)[1]
