"""The arithmetic of the entropy recipe: chances of the ends, pairs of seeds, the rule of the sweet spot."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "control_entropy.py"
NOISE = np.random.default_rng(0).normal(0, 0.2, 20)  # of the seed: the same for every beta


@pytest.fixture(scope="module")
def recipe():
    return runpy.run_path(str(RECIPE))


def sweep(recipe, *returns):
    """A sweep whose final returns are given, one row per beta."""
    betas, nothing = (0.0, 0.01, 0.1, 1.0)[: len(returns)], np.zeros(0)
    return recipe["Sweep"]("grid", betas, nothing, nothing, np.stack(returns), nothing, nothing)


def test_a_bonus_that_is_surely_better_is_the_sweet_spot(recipe):
    """The differences of 0.05 are small beside the noise of the seeds, which pairs remove."""
    verdict = recipe["verdict"](sweep(recipe, NOISE, NOISE + 0.05, NOISE + 0.1, NOISE + 0.02))
    assert verdict == "sweet spot: beta 0.1 (all others are worse)"


def test_betas_that_cannot_be_told_apart_are_listed(recipe):
    other = NOISE + 0.099 + np.where(np.arange(20) % 2, 0.05, -0.05)
    verdict = recipe["verdict"](sweep(recipe, NOISE, NOISE + 0.1, other, NOISE))
    assert verdict == "sweet spot: beta 0.01 (not told apart from it: 0.1)"


def test_without_a_gain_there_is_no_sweet_spot(recipe):
    assert recipe["verdict"](sweep(recipe, NOISE, NOISE - 0.1)) == (
        "sweet spot: none; no bonus is best (all others are worse)"
    )
    a_little = NOISE + np.where(np.arange(20) % 2, 0.06, -0.05)
    assert recipe["verdict"](sweep(recipe, NOISE, a_little, NOISE - 1)) == (
        "sweet spot: none; beta 0.01 is highest, but no bonus is as good (not told apart from it: 0)"
    )


def test_chances_of_the_ends(recipe):
    trap, plain = (recipe["grid_of"](env) for env in ("trap", "gridworld"))
    to_the_right, down = (np.eye(4)[[action] * 36] for action in (1, 2))
    assert recipe["chances_of"](trap, to_the_right) == pytest.approx([0, 1, 0])
    assert recipe["chances_of"](trap, down) == pytest.approx([0, 0, 1])
    halves = (to_the_right + down) / 2  # down first, and then no step leads up to the decoy
    assert recipe["chances_of"](trap, halves) == pytest.approx([0.5, 0.5, 0], abs=1e-8)  # walls hold some up
    assert recipe["chances_of"](plain, halves[:16]) == pytest.approx([1, 0, 0], abs=1e-8)


@pytest.mark.parametrize("name", ["control_2_gridworld", "control_entropy"])
def test_a_log_gets_a_line_per_run(name, capsys):
    watched = runpy.run_path(str(RECIPE.with_stem(name)))["watched"]
    assert list(watched("trap, beta 0", 2)) == [0, 1]
    out, err = capsys.readouterr()
    assert (out, err) == ("", "trap, beta 0: run 1 of 2\ntrap, beta 0: run 2 of 2\n")
