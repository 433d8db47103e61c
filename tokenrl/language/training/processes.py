"""Splits a step over processes: shares prompts and gathers rows.

Advantages and weights are computed from the whole step, identically on every process, and then sliced; the
completions of one prompt stay on one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tokenrl.errors import Stopped, describe

Whole = TypeVar("Whole", Tensor, list[Any])


class StepRows(NamedTuple):
    """Rows of a step, the G completions of each prompt one after the other: those of a process, or all N.

    Attributes:
        rewards: total reward of each completion [N].
        by_function: reward from each of F functions, NaN where it abstained [N, F].
        valid: False where every function abstained [N].
        truncated: True where the completion was cut at the maximum length before an EOS [N].
        prompt_length: number of tokens of the prompt [N].
        mask: True on actions [N, T].
        logprobs: log-probabilities of the tokens under the distribution they were sampled from [N, T].
        entropy: entropy of that distribution at each action, in nats [N, T].
        ref_logprobs: log-probabilities of the tokens under the reference [N, T]; None without a KL.
        values: the critic's value of the state before each action [N, T]; None without a critic.
        score_norms: squared norm of each action's score [N, T]; None unless the baseline is weighted by it.
        greedy_rewards: reward of the greedy completion of the row's prompt [N]; None unless it is needed.
    """

    rewards: Tensor
    by_function: Tensor
    valid: Tensor
    truncated: Tensor
    prompt_length: Tensor
    mask: Tensor
    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None = None
    values: Tensor | None = None
    score_norms: Tensor | None = None
    greedy_rewards: Tensor | None = None

    def inputs(self) -> dict[str, Tensor | None]:
        """Return keyword arguments of `Estimator.advantages`: those that come from the rows."""
        names = ("logprobs", "ref_logprobs", "values", "score_norms", "greedy_rewards")
        return {name: getattr(self, name) for name in names}


@contextlib.contextmanager
def others_needed() -> Iterator[None]:
    """Say in words that this process lost the others, where PyTorch would raise an error of its network.

    Raises:
        Stopped: another process has ended, or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        network = isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
        if isinstance(error, Stopped) or not network:
            raise
        raise Stopped(
            "Another process of this run has ended or does not answer, so this one ends too; what the other "
            f"printed says why. Start all of them again to continue the run. PyTorch said: {describe(error)}"
        ) from error


def share(accelerator: Any, whole: Whole) -> Whole:
    """Return this process's slice of what all processes hold; the slices have equal lengths."""
    size = len(whole) // accelerator.num_processes
    start = accelerator.process_index * size
    return whole[start : start + size]


def summed(accelerator: Any, number: int) -> int:
    """Return the sum of a number over all processes, the same on each of them."""
    if accelerator.num_processes == 1:  # one process need not wait for its device
        return number
    return int(accelerator.reduce(torch.tensor([number], device=accelerator.device), reduction="sum"))


def gather(accelerator: Any, rows: StepRows) -> StepRows:
    """Gather the rows of all processes, in the order of the prompts and padded to the longest completion.

    Raises:
        Stopped: no row of the step has a reward.
    """
    if accelerator.num_processes > 1:
        # Padding would turn a bool mask into int64, and only on the processes that need padding.
        own = rows._replace(mask=rows.mask.to(torch.uint8))._asdict()
        known = {name: x for name, x in own.items() if x is not None}
        known = accelerator.gather(accelerator.pad_across_processes(known, dim=1))
        rows = StepRows(**known | {"mask": known["mask"].bool()})
    if not rows.valid.any():
        raise Stopped(
            "Every reward function abstained from every completion of this step, so there is nothing to "
            "learn from. A reward function should return None only for completions it cannot judge."
        )
    return rows
