"""Estimates what a run will cost, from a trial of it: time, disk and memory."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from tokenrl.language.training.run import Run
from tokenrl.language.training.step import Record
from tokenrl.language.training.update import Learner
from tokenrl.runs.checkup import Finding, time_needed
from tokenrl.runs.space import in_words
from tokenrl.runs.timings import peak_memory

GIB = 1024**3
MOMENTS = {"adamw": 2, "sgd": 0}
"""Numbers that each optimiser keeps for each trainable weight, in the weight's precision."""
CREEP = 1.1
"""By how much memory grows over the first steps, as freed memory comes back in pieces."""
METRICS = 3000
"""About the bytes of a step in metrics.jsonl and timings.jsonl."""


class Disk(NamedTuple):
    """Bytes that a run needs at most, and those that are free."""

    checkpoints: int
    model: int
    logs: int
    free: int

    @property
    def needed(self) -> int:
        """All bytes together."""
        return self.checkpoints + self.model + self.logs


def time_cost(run: Run, records: Sequence[Record], evaluation: float) -> str:
    """Estimate the time of the run in words.

    The lower end takes the fastest sampling and update of the trial steps, the upper end the slowest of each:
    a first step is slower than later ones, and an update leaves out rows without advantage, whose number
    changes. Neither end knows how the length of completions will change.

    Args:
        run: the run.
        records: the trial steps.
        evaluation: seconds of one evaluation.
    """
    args = run.args
    parts = [[record.timings[name] for record in records] for name in ("collect", "update")]
    count = 1 + -(-run.budget.plain_steps // args.eval_every) if args.eval_every else 2
    low, high = (args.max_steps * sum(map(end, parts)) + count * evaluation for end in (min, max))
    return f"{time_needed(low, high)} for {args.max_steps} steps and {count} evaluations"


def disk_cost(run: Run, place: Path, records: Sequence[Record]) -> Disk:
    """Estimate the bytes that the run needs at most: checkpoints, model and logs.

    One checkpoint more than are kept lies there while a new one is written. A checkpoint has the weights (of
    an adapter the adapter's own) and the optimiser's moments.

    Args:
        run: the run.
        place: the run directory.
        records: trial steps, the first of which shows the size of a table of completions.
    """
    args, policy = run.args, run.learner.policy
    model, trained = bytes_of(list(policy.model.parameters())), bytes_of(policy.trainable_parameters())
    weights = trained if policy.has_adapter else model
    table = sum(len(str(row).encode()) for record in records[:1] for row in record.rows())
    tables = 1 + run.budget.plain_steps // args.log_completions if args.log_completions else 0
    return Disk(
        (args.keep_checkpoints + 1) * (weights + moments_of(run.learner)),
        model + (trained if policy.has_adapter else 0),
        tables * table + args.max_steps * METRICS,
        shutil.disk_usage(place).free,
    )


def disk_finding(run: Run, disk: Disk) -> Finding | None:
    """Return a finding if the run may need more disk than is free."""
    if disk.needed <= disk.free:
        return None
    found = (
        f"The run may need {in_words(disk.needed)} on the disk of {run.args.output_dir}, of which "
        f"{in_words(disk.checkpoints)} for checkpoints, and {in_words(disk.free)} are free."
    )
    mend = "Free space, give an --output-dir on another disk, or keep fewer (--keep-checkpoints 1)."
    return Finding("disk-too-small", found, "The run would stop when the disk is full.", mend)


def memory_cost(run: Run) -> str:
    """Return in words the most memory that the run will hold, if its completions become no longer.

    It is what was held so far, and the moments, which the first update makes, and a little for `CREEP`.
    """
    moments = moments_of(run.learner)
    peak = peak_memory()
    on_gpu = run.learner.policy.device.type == "cuda"
    shown = []
    for name, where in (("peak_cuda_memory_gib", "of the GPU"), ("peak_memory_gib", "of the computer")):
        if name in peak:
            more = moments if on_gpu == (name == "peak_cuda_memory_gib") else 0
            creep = CREEP if name == "peak_memory_gib" else 1.0
            shown.append(f"about {in_words(creep * (peak[name] * GIB + more))} {where}")
    return ", ".join(shown) if shown else "unknown"


def moments_of(learner: Learner) -> int:
    """Return the bytes that the optimiser keeps beside the weights."""
    return MOMENTS[learner.args.optimizer] * bytes_of(learner.policy.trainable_parameters())


def bytes_of(parameters: Sequence[nn.Parameter]) -> int:
    """Return the bytes of weights, which their gradient takes too."""
    return sum(p.nbytes for p in parameters)
