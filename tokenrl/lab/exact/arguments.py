"""The arguments of `tokenrl lab`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from tokenrl.settings import Settings


@dataclass(frozen=True)
class LabArguments(Settings):
    """Check the declared bias of every estimator by summing over everything that can be sampled."""

    what: tyro.conf.Positional[Literal["exact"]]
    """exact: enumerate every group of completions of tiny problems, in float64."""
    json: Path | None = None
    """Write one record per estimator to this JSON file."""
    figure: Path | None = None
    """Draw the noise of each estimator against its bias into this file (.png, .svg or .pdf)."""
    estimators: tuple[str, ...] = ()
    """Measure only these estimators, named as in the table. Default: all."""
