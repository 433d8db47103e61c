"""What several processes change in a step: each samples its share, all know the whole step, none waits alone.

Advantages and weights are computed from the whole step, identically on every process, and then sliced; a
group of completions never crosses processes. Each process makes the same number of backward passes, because
the gradients are averaged in the last of them, where all processes meet.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from tokenrl.errors import Stopped

Whole = TypeVar("Whole", Tensor, list[Any])


class StepRows(NamedTuple):
    """Rows of a step, prompt-major: the n of this process or, once gathered, all N.

    Attributes:
        rewards: total reward of each completion [N].
        by_function: reward by each function, NaN where it abstained [N, F].
        valid: False where every function abstained [N].
        truncated: True where the length cap came before an EOS [N].
        prompt_length: tokens of the prompt [N].
        mask: True on actions [N, T].
        logprobs: of the tokens, under the distribution that they were sampled from [N, T].
        entropy: of that distribution at each action, in nats [N, T].
        ref_logprobs: of the tokens under the reference [N, T]; None without a KL.
        values: the critic's, of the state before each action [N, T]; None without a critic.
        score_norms: squared norm of each action's score [N, T]; None where no baseline weighs by it.
        greedy_rewards: reward of the greedy completion of the row's prompt [N]; None where none is compared.
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
        """What `Estimator.advantages` may ask for besides rewards and mask, by its names."""
        names = ("logprobs", "ref_logprobs", "values", "score_norms", "greedy_rewards")
        return {name: getattr(self, name) for name in names}


def share(accelerator: Any, whole: Whole) -> Whole:
    """This process's part of what all processes hold: as many prompts, or rows, for each of them."""
    size = len(whole) // accelerator.num_processes
    start = accelerator.process_index * size
    return whole[start : start + size]


def gather(accelerator: Any, rows: StepRows) -> StepRows:
    """The rows of every process in the order of the prompts, identical on all; columns padded to the widest.

    Raises:
        Stopped: no row of the step has a reward.
    """
    if accelerator.num_processes > 1:
        # Padding turns a bool into an int64, on those processes only that need any.
        found = rows._replace(mask=rows.mask.to(torch.uint8))._asdict()
        for name, x in found.items():
            if x is not None:
                found[name] = accelerator.gather(
                    accelerator.pad_across_processes(x, dim=1) if x.ndim > 1 else x
                )
        rows = StepRows(**found | {"mask": found["mask"].bool()})
    if not rows.valid.any():
        raise Stopped(
            "Every reward function abstained from every completion of this step, so there is nothing to "
            "learn from. Return None only where there is no number."
        )
    return rows


def equal_passes(accelerator: Any, active: Tensor, size: int | None) -> list[Tensor]:
    """This process's active rows, some for each backward pass; every process gets as many passes.

    Args:
        accelerator: accelerate's handle of the processes.
        active: which rows of the step are computed, the same on every process [N].
        size: most rows of a pass; None for all that a process has.

    Returns:
        Numbers of rows among this process's own, none of them in a pass in which only others have work.
    """
    by_process = active.view(accelerator.num_processes, -1)  # [W, n]
    size = size or by_process.shape[1]
    count = -(-int(by_process.sum(dim=1).max()) // size)
    mine = by_process[accelerator.process_index].nonzero().squeeze(1)
    return [mine[k * size : (k + 1) * size] for k in range(count)]
