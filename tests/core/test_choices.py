"""The table of choices is complete: each row has a formula, each formula a row, and each name a bias."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest
import tyro

from tokenrl.core import Estimator
from tokenrl.core.baselines import BASELINES
from tokenrl.core.choices import AXES, CHOICES, FROM_BEST_TO_WORST, KL_EFFECTS, UNKNOWN
from tokenrl.core.losses import PER_TOKEN
from tokenrl.core.scales import SCALES

FORMULAS = {
    "baseline": BASELINES,
    "scale": SCALES,
    "kl_estimator": PER_TOKEN,
}
# Names within one formula, or which say how the formula of another axis is used, or which rows are used.
WITHOUT_FORMULA = {
    "aggregation",
    "ratio",
    "returns",
    "optimal_form",
    "kl_placement",
    "entropy_form",
    "zero_spread",
    "truncations",
}
EVERY_NAME = [(axis, name) for axis, names in AXES.items() for name in names]


def test_every_axis_has_formulas_or_needs_none() -> None:
    assert set(FORMULAS) | WITHOUT_FORMULA == set(AXES)


@pytest.mark.parametrize("axis", FORMULAS)
def test_every_row_has_a_formula_and_every_formula_a_row(axis) -> None:
    assert set(FORMULAS[axis]) == set(AXES[axis])


@pytest.mark.parametrize(("axis", "name"), EVERY_NAME)
def test_every_name_has_a_stated_bias(axis, name) -> None:
    if axis in CHOICES:
        stated = [CHOICES[axis][name]]
        stated += [more for more in (stated[0].row_inside, stated[0].discounted) if more is not None]
    else:
        stated = [effect for pair, effect in KL_EFFECTS.items() if name in pair]
    assert stated
    for effect in stated:
        assert effect.status in FROM_BEST_TO_WORST and effect.status != UNKNOWN and effect.reason


@pytest.mark.parametrize(("axis", "name"), EVERY_NAME)
def test_every_name_makes_an_estimator_with_a_status(axis, name) -> None:
    plain = {"returns": "reward_to_go"} | ({"baseline": "none"} if name == "episode_normalized" else {})
    e = Estimator(**plain | {axis: name})
    assert e.bias_status in FROM_BEST_TO_WORST and e.bias_reason


def test_the_fields_of_the_estimator_allow_the_names_of_the_table() -> None:
    hints = get_type_hints(Estimator)
    assert {axis: get_args(hints[axis]) for axis in AXES} == AXES


def test_the_command_line_lists_them(capsys) -> None:
    with pytest.raises(SystemExit):
        tyro.cli(Estimator, args=["--help"])
    printed = capsys.readouterr().out
    assert [name for _, name in EVERY_NAME if name not in printed] == []
