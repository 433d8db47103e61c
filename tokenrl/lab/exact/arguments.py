"""The arguments of `tokenrl lab`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tokenrl.settings import Settings


@dataclass(frozen=True)
class LabArguments(Settings):
    """Prove or refute the declared bias of every estimator, by summing over all that can be sampled."""

    what: tyro.conf.Positional[Literal["exact"]]
    """exact: tiny problems, every group of completions listed, in float64."""
    json: Path | None = None
    """Write one record an estimator to this file."""
    figure: Path | None = None
    """Draw noise against bias into this file (.png, .svg or .pdf)."""
    estimators: tuple[str, ...] = ()
    """Only these of the names in the table."""
