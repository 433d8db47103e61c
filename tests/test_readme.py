"""The README's table of estimators is what the code says."""

from __future__ import annotations

from pathlib import Path

from tokenrl.core import Estimator
from tokenrl.core.presets import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text()


def row(name):
    e = Estimator.preset(name)
    kl = f"{e.kl_estimator} in the {e.kl_placement}"
    return f"| `{name}` | {e.baseline} | {e.scale} | {e.aggregation} | {e.ratio} | {kl} | {e.bias_status} |"


def test_every_preset_has_its_row():
    for name in PRESETS:
        assert row(name) in README, row(name)
