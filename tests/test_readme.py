"""The README's table of estimators is what the code says and what the lab finds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenrl.core import Estimator
from tokenrl.core.presets import PRESETS

README = (Path(__file__).parents[1] / "README.md").read_text()


def row(name):
    e = Estimator.preset(name)
    return f"| `{name}` | {e.baseline} | {e.scale} | {e.aggregation} | {e.ratio} | {e.bias_status} |"


def test_every_preset_has_its_row():
    for name in PRESETS:
        assert row(name) in README, row(name)


@pytest.mark.slow
def test_the_numbers_are_those_of_the_lab():
    from tokenrl.lab import measure_bias

    for name in PRESETS:
        verdict = measure_bias(Estimator.preset(name))
        assert f"{row(name)} {verdict.cosine:.3f} | {verdict.noise:.2f} |" in README, name
