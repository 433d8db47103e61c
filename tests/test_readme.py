"""The tables of estimators in the README and in recipes/ are what the code says and what the lab finds."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tokenrl.core import PRESETS, Estimator

ROOT = Path(__file__).parents[1]
README, ALL = (ROOT / "README.md").read_text(), (ROOT / "recipes" / "estimators.md").read_text()


def row(name):
    e = Estimator.preset(name)
    return f"| `{name}` | {e.baseline} | {e.scale} | {e.aggregation} | {e.ratio} | {e.bias_status} |"


def named(page):
    return re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)


def test_every_preset_has_its_row():
    assert named(ALL) == list(PRESETS)
    for name in PRESETS:
        assert row(name) in ALL, row(name)


def test_the_readme_keeps_ten_rows_of_the_table():
    assert len(named(README)) == 10
    lines = ALL.splitlines()
    for line in README.splitlines():
        if line.startswith("| `"):
            assert line in lines


@pytest.mark.slow
def test_the_numbers_are_those_of_the_lab():
    from tokenrl.lab import measure_bias

    for name in PRESETS:
        verdict = measure_bias(Estimator.preset(name))
        assert f"{row(name)} {verdict.cosine:.3f} | {verdict.noise:.2f} |" in ALL, name
