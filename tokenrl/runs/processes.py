"""Everything that the processes of a run do together: how they are joined, and what they exchange.

Nothing else in the package calls accelerate's collectives. Each function that exchanges something has to be
called by every process, in the same order. In a run of a single process they return what they were given.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tokenrl.errors import Finished, Refused, ending

T = TypeVar("T")
Whole = TypeVar("Whole", Tensor, list[Any])

HEEDED = (
    "USE_CPU",
    "TORCH_DEVICE",
    "CPU_AFFINITY",
    "NUM_PROCESSES",
    "DEBUG_MODE",
    "LOG_LEVEL",
    "ENABLE_RICH",
)
"""Variables of accelerate, without their prefix, that say where a run computes and not what."""


def make_accelerator(cpu: bool | None) -> Any:
    """Make accelerate's handle of device, precision and processes.

    Args:
        cpu: whether to compute on the CPU even if there is a GPU; None to take a GPU if there is one.

    Raises:
        Refused: accelerate refuses the settings.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    # accelerate remembers the device and the precision of the first run of a program; each run has its own.
    # else processes must not be joined again
    alone = PartialState._shared_state.get("num_processes") == 1
    AcceleratorState._reset_state(reset_partial_state=alone)
    # Without a GPU accelerate joins the processes that torchrun has started only if it is told so.
    # Accelerate would take the device of this variable even if it is told to take the CPU.
    hidden = overruled()
    if cpu is True:
        hidden.append("ACCELERATE_TORCH_DEVICE")
    values = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        return Accelerator(cpu=cpu or not torch.accelerator.is_available(), mixed_precision="no")
    except ValueError as error:
        raise Refused(
            f"accelerate cannot be set up as asked: {' '.join(str(error).split())}"
        ) from error
    finally:
        os.environ.update(values)


def overruled() -> list[str]:
    """Return the environment variables of accelerate by which it would compute otherwise than a run says."""
    names = [name for name in os.environ if name.startswith("ACCELERATE_")]
    return sorted(name for name in names if name.removeprefix("ACCELERATE_") not in HEEDED)


def local(accelerator: Any, whole: Whole) -> Whole:
    """Return this process's part of what all processes hold; the parts have equal lengths."""
    size = len(whole) // accelerator.num_processes
    start = accelerator.process_index * size
    return whole[start : start + size]


def gather_rows(
    accelerator: Any, columns: Mapping[str, Tensor], left_padded: Collection[str] = ()
) -> dict[str, Tensor]:
    """Gather columns of rows from all processes, in the order of the processes.

    Args:
        accelerator: accelerate's handle of device and processes.
        columns: tensors [n, ...] of this process, on any device; the second dimension may differ.
        left_padded: names of the columns that are padded on the left, as prompts are.

    Returns:
        The columns [N, ...] on the accelerator's device; those of truth values are uint8.
    """
    sent = {}
    for name, column in columns.items():
        # Padding would turn truth values into int64, and only on the processes that need padding.
        column = column.to(torch.uint8) if column.dtype == torch.bool else column
        column = column.to(accelerator.device)
        is_left = name in left_padded
        sent[name] = accelerator.pad_across_processes(column, dim=1, pad_first=is_left)
    return dict(accelerator.gather(sent))


def gather_objects(objects: list[Any]) -> list[Any]:
    """Return the objects of all processes, which pickle can write, in the order of the processes."""
    from accelerate.utils import gather_object

    return list(gather_object(objects))


def agreed(act: Callable[..., T]) -> Callable[..., T]:
    """Decorate a function in which code of the user's may end the run: `Finished` is raised in all processes then.

    Every process has to call the function, and none may wait for another one in it.
    """

    @wraps(act)
    def together(*args: Any, **options: Any) -> T:
        words: list[str] = []
        with ending(words):
            result = act(*args, **options)
        if everywhere := gather_objects(words):
            raise Finished(everywhere[0])
        return result

    return together


def all_reduce_max(accelerator: Any, numbers: Sequence[int]) -> Sequence[int]:
    """Return the element-wise maximum over processes; without an accelerator there is a single process."""
    if accelerator is None or accelerator.num_processes == 1:  # it need not wait for its device
        return numbers
    everywhere: Tensor = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
    return everywhere.amax(dim=0).tolist()


def all_reduce_sum(accelerator: Any, numbers: Tensor) -> Tensor:
    """Return the element-wise sum over processes; in a single process it stays on its device."""
    if accelerator.num_processes == 1:
        return numbers
    total: Tensor = accelerator.reduce(numbers.to(accelerator.device), reduction="sum")
    return total


def sum_gradients(accelerator: Any, parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over processes, once after an update's last pass, so that passes need not be equal.

    A weight without a gradient counts as one whose gradient is 0.
    """
    if accelerator.num_processes > 1:
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            parameter.grad = all_reduce_sum(accelerator, gradient)


def broadcast_weights(model: nn.Module) -> None:
    """Give all processes the weights of the main process, since each draws new weights for itself."""
    from accelerate.utils import broadcast

    for parameter in model.parameters():
        broadcast(parameter.data)
