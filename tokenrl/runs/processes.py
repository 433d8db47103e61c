"""Everything that the processes of a run do together: how they are joined, and what they exchange.

Nothing else in the package calls accelerate's collectives. Every process has to call each of these functions.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from tokenrl.errors import Refused

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


def make_accelerator(args: Any) -> Any:
    """Make accelerate's handle of device, precision and processes, as the arguments of a run say.

    Raises:
        Refused: accelerate refuses the settings.
    """
    from accelerate import Accelerator, PartialState
    from accelerate.state import AcceleratorState

    # accelerate remembers the device and the precision of the first run of a program; each run has its own.
    alone = (
        PartialState._shared_state.get("num_processes") == 1
    )  # else processes must not be joined again
    AcceleratorState._reset_state(reset_partial_state=alone)
    # Without a GPU accelerate joins the processes that torchrun has started only if it is told so.
    cpu = args.cpu or not torch.accelerator.is_available()
    # Accelerate would take the device of this variable even if it is told to take the CPU.
    hidden = [*overruled(), *["ACCELERATE_TORCH_DEVICE"] * (args.cpu is True)]
    values = {name: os.environ.pop(name) for name in hidden if name in os.environ}
    try:
        return Accelerator(cpu=cpu, mixed_precision="no")
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
