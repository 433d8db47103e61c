"""A ceiling is told where every arm ends at it, with a smaller budget only where the arms differ there."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from made_comparison import EPISODES, NONE, PROBLEM, RLOO, compared, noise, record, said, six

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.records import Problem, RunRecord

SOLVED = replace(PROBLEM, reward_range=None, solved=0.9)


def ends(rloo: float, none: float, problem: Problem = PROBLEM, **options: Any) -> Comparison:
    records = [*six(RLOO, rloo, problem=problem), *six(NONE, none, 0.003, problem=problem)]
    return compared(records, problem=problem, **options)


def test_a_ceiling_is_where_every_arm_ends_within_the_margin_of_the_best() -> None:
    (text,) = said(ends(0.99, 0.981), "Ceiling")
    assert "within 0.02 of the best possible reward, 1," in text
    assert said(ends(0.99, 0.979), "Ceiling") == []
    assert said(ends(0.979, 0.99), "Ceiling") == []
    assert said(ends(0.99, 0.979, margin=0.022), "Ceiling"), "the margin decides"
    assert said(ends(0.99, 0.99, margin=None), "Ceiling") == []
    low = replace(PROBLEM, reward_range=(-1.0, 0.0))
    assert said(ends(-0.01, -0.019, low), "Ceiling") and not said(ends(-0.01, -0.021, low), "Ceiling")


def test_without_a_range_a_ceiling_is_what_counts_as_solved() -> None:
    (text,) = said(ends(0.99, 0.91, SOLVED), "Ceiling")
    assert "at 0.91 or above, and 0.9 counts as solved" in text
    assert said(ends(0.99, 0.89, SOLVED), "Ceiling") == []
    assert said(ends(0.99, 0.99, replace(SOLVED, solved=None)), "Ceiling") == []


def test_the_final_reward_decides_on_a_ceiling_and_not_the_score_of_the_plan() -> None:
    late = [record(a, s, (0, 0.1, 0.1, 0.2, 0.5, 0.99 + noise(s))) for a in (RLOO, NONE) for s in range(6)]
    assert said(compared(late), "Ceiling")


def test_an_arm_whose_end_nobody_knows_may_be_anywhere() -> None:
    unknown = [replace(one, scores={"entropy": 0.1}, curves={}) for one in six(NONE)]
    records = [*six(RLOO, 0.99), *unknown]
    assert said(compared(records, metric="entropy", margin=None, problem=SOLVED), "Ceiling") == []


def at_the_ceiling(gaps: dict[int, float], spreads: dict[int, float] | None = None) -> list[RunRecord]:
    """Two arms that both end at .99, apart by a gap at some places, with a spread of their difference."""
    records = []
    for seed in range(6):
        shared = [0.0, 0.5, 0.7, 0.9, 0.98, 0.99]
        other = [
            x + gaps.get(place, 0.0) + noise(seed, (spreads or {}).get(place, 0.002))
            for place, x in enumerate(shared)
        ]
        records += [record(RLOO, seed, shared), record(NONE, seed, other)]
    return records


@pytest.mark.parametrize(("place", "samples"), [(1, 80), (2, 160), (3, 240), (4, 320)])
def test_a_ceiling_comes_with_the_budget_at_which_the_arms_lie_farthest_apart(
    place: int, samples: int
) -> None:
    (text,) = said(compared(at_the_ceiling({place: -0.1})), "Ceiling")
    assert f"after {samples} completions" in text and f"--max-samples {samples};" in text


def test_farthest_apart_is_relative_to_the_spread_over_seeds() -> None:
    records = at_the_ceiling({1: -0.3, 2: -0.1}, {1: 0.1, 2: 0.002})
    assert "--max-samples 160" in said(compared(records), "Ceiling")[0]
    records = at_the_ceiling({1: -0.3, 2: -0.1}, {1: 0.002, 2: 0.002})
    assert "--max-samples 80" in said(compared(records), "Ceiling")[0]


def test_no_smaller_budget_is_named_where_the_end_separates_best_or_nothing_does() -> None:
    same, alike = dict.fromkeys(range(6), 0.0), {2: 0.001}
    for gaps, spreads in (({5: 0.009, 2: -0.002}, {5: 0.0001}), ({}, same), (alike, {})):
        (text,) = said(compared(at_the_ceiling(gaps, spreads)), "Ceiling")
        assert text.endswith("hardly separates them.")


def test_farthest_apart_is_beyond_what_the_best_of_five_places_shows_by_chance() -> None:
    """With 2 arms and 6 seeds F has 1 and 5 degrees of freedom; at the level .05 / 5 its limit is 16.3."""
    for gap, told in ((-0.0193, False), (-0.0257, True)):  # F = t^2 = 10 and 17.7
        (text,) = said(compared(at_the_ceiling({2: gap}, {2: 0.02})), "Ceiling")
        assert ("--max-samples 160" in text) == told


def test_the_spread_that_seeds_share_does_not_hide_where_arms_differ() -> None:
    """At 80 samples seeds differ much, but in both arms alike; only the pairs tell."""
    shifted = []
    for one in at_the_ceiling({1: -0.05, 3: -0.02}):
        curve = list(one.curves["reward"])
        curve[1] += noise(one.run.seed, 0.4)
        shifted.append(record(RLOO if one.run.arm == "rloo" else NONE, one.run.seed, curve))
    assert "--max-samples 80" in said(compared(shifted), "Ceiling")[0]


def test_an_evaluation_that_is_nan_hides_no_budget() -> None:
    records = at_the_ceiling({2: -0.1})
    curve = list(records[1].curves["reward"])
    records[1] = record(NONE, 0, [*curve[:3], math.nan, *curve[4:]])
    assert "--max-samples 160" in said(compared(records), "Ceiling")[0]


def test_in_control_the_smaller_budget_is_given_in_steps() -> None:
    problem = replace(EPISODES, solved=0.9)
    arms = {"rloo": RLOO, "none": NONE}
    made = at_the_ceiling({2: -0.1})
    records = [record(arms[r.run.arm], r.run.seed, r.curves["reward"], problem=problem) for r in made]
    (text,) = said(compared(records, problem=problem, margin=None), "Ceiling")
    assert "after 160 episodes" in text and "--max-steps 20;" in text
