"""Defines the settings of saving and resuming, which all trainings have. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from tokenrl.settings import Count, Natural, NonNegative, Settings


@dataclass(frozen=True)
class SavingArguments(Settings, group="checkpoints"):
    """When a run saves checkpoints, and from which it continues.

    A checkpoint is also saved at the end of a run, whatever ends it, so that the run can be continued.
    """

    save_every: Natural = 0
    """Steps between checkpoints; 0: by time alone."""
    save_minutes: NonNegative = 10.0
    """Minutes between checkpoints; 0: by steps alone."""
    keep_checkpoints: Count = 2
    """How many checkpoints are kept, the newest ones."""
    resume: str | None = None
    """Continue the run that output_dir holds, bit for bit, as if it had never ended: auto takes its newest
    whole checkpoint, and starts the run where there is none yet; or name a checkpoint. The other settings
    must be those of the run; only max_steps, max_samples and what concerns saving, logging and safety stops
    may change."""
