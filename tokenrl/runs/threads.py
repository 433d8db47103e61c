"""Decides with how many threads torch computes on a CPU. Imports torch only when it is called.

Threads that share one operation wait for each other at its end. In a large model on a quiet machine they save
time. In a small model they save nothing, and where other programs keep the processors busy, each wait can
last as long as another program's turn, which makes a step ten to a hundred times slower. The numbers are
settings of a run, because results differ by rounding between one thread and two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, Any, NamedTuple, TypeVar

from tokenrl.settings import Bounds, Settings

T = TypeVar("T", bound=Any)

FEW = 250_000
"""Models with fewer parameters get one thread without a measurement. With half a million, as in toy tasks, a
second thread makes a step 1.2 to 1.8 times faster here."""
MARGIN = 1.2
"""More threads must be faster by this factor, because the machine may become busier during the run."""
PAIRS = 6
"""How often fewer and more threads are compared; the first pair only warms up."""
WAITING = 2.0
"""One call that takes so many times as long with more threads shows that they wait for other programs."""
ENOUGH = 0.5
"""Seconds after which two pairs are enough, since each is long."""

Threads = Annotated[int, Bounds(at_least=1, at_most=1024)]
"""A number of threads; far more of them than processors end the process instead of speeding it up."""


@dataclass(frozen=True)
class TrainingThreads(Settings, group="threads"):
    """With how many threads torch computes on a CPU. Their number changes results by rounding only."""

    training_threads: Threads | None = None
    """Threads for updates. Default: OMP_NUM_THREADS if it is set; else 1 for a small model, and for others
    what a short measurement at the start finds."""


@dataclass(frozen=True)
class ThreadArguments(TrainingThreads, group="threads"):
    """With how many threads torch computes on a CPU. Their number changes results by rounding only."""

    sampling_threads: Threads | None = None
    """Threads for sampling. Default: as for training, with a measurement of its own."""


class Choice(NamedTuple):
    """A number of threads, and where it comes from in words; `measured` if from a measurement."""

    number: int
    why: str
    measured: bool = False


@contextmanager
def using_threads(number: int | None) -> Iterator[None]:
    """Let torch compute with this many threads inside the block; None leaves its number as it is."""
    import torch

    before = torch.get_num_threads()
    try:
        if number is not None:
            torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)


def choose_threads(
    work: Callable[[], object],
    parameters: int,
    given: int | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Choose the number of threads for some work on the CPU, at most as many as torch uses now.

    A setting is followed first, then OMP_NUM_THREADS, then what starts several processes. Otherwise some
    products of matrices are timed first, because on a busy machine that takes far less time than the work.
    Then the work is timed with 1, 2, 4 ... threads, until more threads are not clearly faster.

    Args:
        work: a small piece of the work, of some milliseconds.
        parameters: number of the model's parameters.
        given: the number that the settings say; None to choose one.
        clock: returns the time in seconds.
    """
    import torch

    most = torch.get_num_threads()
    if given is not None:
        return Choice(given, "as set")
    if os.environ.get("OMP_NUM_THREADS"):
        return Choice(most, "OMP_NUM_THREADS")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return Choice(most, "one of several processes")
    if most == 1:
        return Choice(1, "torch has no more")
    if parameters < FEW:
        return Choice(1, f"more are no use to {parameters:,} parameters")
    number, best = 1, dict[int, float]()
    if not _faster(_multiply, 1, 2, {}, clock):
        return Choice(1, "measured: the processors are busy", measured=True)
    while number < most and _faster(work, number, min(2 * number, most), best, clock):
        number = min(2 * number, most)
    found = ", ".join(f"{seconds * 1e3:.3g} ms with {n}" for n, seconds in sorted(best.items()))
    return Choice(number, f"measured: {found}", measured=True)


def _multiply() -> None:
    """Compute products of matrices, of a few milliseconds with one thread."""
    import torch

    matrix = torch.ones(384, 384)
    for _ in range(8):
        matrix @ matrix


def _faster(
    work: Callable[[], object], fewer: int, more: int, best: dict[int, float], clock: Callable[[], float]
) -> bool:
    """Return whether more threads are clearly faster in the middle of several pairs, and never far slower.

    The middle leaves out calls that happen to be disturbed, of either number. Threads that wait for other
    programs make some calls far longer than one thread ever takes: a single such call decides.

    Args:
        work: what is timed.
        fewer: a number of threads.
        more: a larger one.
        best: the time in the middle so far by number of threads, in seconds; it is added to.
        clock: returns the time in seconds.
    """
    times: dict[int, list[float]] = {fewer: [], more: []}
    start = clock()
    for pair in range(PAIRS):
        for number, taken in times.items():
            with using_threads(number):
                began = clock()
                work()
                taken.append(clock() - began)
        best.update({number: median(taken[1:] or taken) for number, taken in times.items()})
        if times[more][-1] > WAITING * best[fewer]:
            return False
        if pair and clock() - start > ENOUGH:
            break
    return best[more] * MARGIN <= best[fewer]


def threads_in_words(choices: Mapping[str, Choice]) -> str:
    """Return the choices by stage as one line, such as `1 for sampling, 2 for training (as set)`."""
    stages: dict[Choice, list[str]] = {}
    for stage, choice in choices.items():
        stages.setdefault(choice, []).append(stage)
    return ", ".join(f"{c.number} for {' and '.join(names)} ({c.why})" for c, names in stages.items())


def with_threads(args: T, choices: Mapping[str, Choice]) -> T:
    """Return the settings with the chosen numbers, so that config.json records them."""
    return replace(args, **{f"{stage}_threads": choice.number for stage, choice in choices.items()})
