"""Decides with how many threads torch computes on a CPU, and which attention on a GPU it must not take, by rules.

Imports torch only when it is called.

Threads that share one operation wait for each other at its end. In a large model they save time. In a small
model they save little, and where other programs keep the processors busy, each wait can last as long as
another program's turn, which makes a step ten to a hundred times slower.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock
from typing import Annotated, Any

from tokenrl.errors import Refused
from tokenrl.settings import OPEN, Bounds, Settings

SMALL = 10_000_000
"""Models with fewer parameters get one thread."""


@dataclass(frozen=True)
class ThreadArguments(Settings, group="threads"):
    """With how many threads torch computes on a CPU. Their number changes results by rounding only."""

    threads: Annotated[int, Bounds(at_least=1, at_most=1024)] = OPEN
    """Threads of torch. Default: OMP_NUM_THREADS if it is set; else 1 for a model below 10 M parameters, and
    one for each processor for a larger one."""


_RUN = RLock()
"""Held by the thread of this process in which a run is going on."""


@contextmanager
def alone() -> Iterator[None]:
    """Let no other thread of this process make a run during the block; this thread may begin further ones.

    The global generators, and torch's settings and number of threads, are those of the whole process, so two runs at
    the same time would change each other's numbers.

    Raises:
        Refused: a run is going on in another thread.
    """
    if not _RUN.acquire(blocking=False):
        raise Refused(
            "A run is going on in another thread of this process, and two would change each other's numbers, as "
            "they share generators and settings of torch: wait for it to end, or start another process."
        )
    try:
        yield
    finally:
        _RUN.release()


@contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """Let torch compute with this many threads inside the block, `alone`; None leaves its number as it is."""
    import torch

    with alone():
        before = torch.get_num_threads()
        torch.set_num_threads(number or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Let torch take other kernels than cuDNN's for attention inside the block.

    With a mask in bfloat16 the backward pass of torch 2.13's may give NaN, where the length is 64 above a multiple
    of 128 (pytorch 196678).
    """
    import torch

    attention: Any = torch.backends.cuda
    before = attention.cudnn_sdp_enabled()
    attention.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        attention.enable_cudnn_sdp(before)


def choose_threads(parameters: int, threads: int | None = None) -> tuple[int, str]:
    """Choose the number of threads for a model.

    Args:
        parameters: number of the model's parameters.
        threads: the number that the settings say; None to choose one.

    Returns:
        The number, and in words where it comes from.
    """
    import torch

    if threads is not None:
        return threads, "as set"
    if os.environ.get("OMP_NUM_THREADS"):
        return torch.get_num_threads(), "OMP_NUM_THREADS"
    if parameters < SMALL:
        return 1, f"fewer than {SMALL // 10**6} M parameters"
    return torch.get_num_threads(), "as many as torch takes"
