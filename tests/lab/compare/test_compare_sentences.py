"""Each finding is said exactly when the numbers say so: once beyond its limit, and not just below it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from made_comparison import NONE, RLOO, arm, compared, noise, record, rising, said, six

from tokenrl.lab.compare.comparison import Comparison


def test_ordinary_results_give_no_finding() -> None:
    found = compared([*six(RLOO), *six(NONE, 0.7, 0.003)])
    assert found.findings == {"digits": ()}
    assert found.judgement.verdicts() == {("digits", "none"): "worse"}


# Exploratory


def test_what_was_changed_after_results_were_known_is_said_first() -> None:
    records = [*six(RLOO, 0.99, grad_clipped=0.9), *six(NONE, 0.99)]
    changes = ("the margin was changed from 0.1 to 0.2", "the number of seeds was changed from 4 to 6")
    first, *others = compared(records, changes=changes).findings["digits"]
    assert first.startswith(f"Exploratory: {changes[0]}; {changes[1]}. ") and "--first-seed" in first
    assert [text.split(":")[0] for text in others] == ["Ceiling", "Clipping"]


def test_an_arm_that_came_in_late_makes_a_comparison_exploratory() -> None:
    records = [*six(RLOO), *six(NONE)]
    late = replace(NONE, exploratory=True)
    assert (
        "Exploratory: none came in after runs had begun."
        in said(compared(records, arms=(RLOO, late)), "Exploratory")[0]
    )
    told = compared(records, arms=(RLOO, late), changes=("the arms none were added",))
    assert said(told, "Exploratory")[0].startswith("Exploratory: the arms none were added. Who sees")
    assert said(compared(records), "Exploratory") == []


# Sharpness


def sharp(
    gain: float = 0.05,
    greedy: float = 0.0,
    entropy: float = -0.2,
    spread: float = 0.01,
    metric: str = "area",
    **others: Any,
) -> Comparison:
    """An arm that differs by a gain in sampled reward, and by so much in greedy reward and entropy."""
    records = []
    for seed in range(6):
        records.append(record(RLOO, seed, (0.1, *[0.5] * 5), (0.1, *[0.9] * 5), entropy=0.4))
        sampled = (0.1, *[0.5 + gain + noise(seed, 0.002)] * 5)
        known = (0.1, *[0.9 + greedy + noise(seed, spread)] * 5)
        records.append(
            record(NONE, seed, sampled, known, entropy=0.4 + entropy + noise(seed, 0.01), **others)
        )
    return compared(records, metric=metric)


def sharpness(**numbers: Any) -> list[str]:
    return said(sharp(**numbers), "Sharpness")


def test_a_gain_without_greedy_gain_and_with_lower_entropy_may_be_sharpness_alone() -> None:
    (text,) = sharpness()
    assert "over the budget none has a sampled reward that is 0.05 higher than that of rloo" in text
    assert "(0.2 against 0.4 nats)" in text
    assert sharpness(metric="reward"), "said for the final reward too"


def test_where_the_reference_is_sharper_it_is_named_and_signs_are_turned() -> None:
    found = sharp(gain=-0.05, entropy=0.2, greedy=-0.002)
    (text,) = said(found, "Sharpness")
    assert "rloo has a sampled reward that is 0.05 higher than that of none" in text
    assert "(0.4 against 0.6 nats)" in text
    greedy = found.beside["area_greedy"].families[0].differences[0].mean
    assert greedy.value == pytest.approx(-0.002)
    assert f"(+0.002 [{-greedy.high:.3g}, {-greedy.low:.3g}])" in text


@pytest.mark.parametrize(
    "numbers",
    [
        {"gain": 0.0005},
        {"greedy": 0.02},
        {"greedy": 0.02, "spread": 0.03, "gain": 0.035},
        {"entropy": -0.001},
        {"entropy": 0.2},
        {"gain": -0.05},
        {"metric": "reward_greedy"},
        {"metric": "entropy"},
        {"clipped_ratio": 0.9},
    ],
    ids=str,
)
def test_else_nothing_is_said_of_sharpness(numbers: dict[str, Any]) -> None:
    assert sharpness(**numbers) == []


def test_a_greedy_difference_counts_as_none_below_half_of_the_gain() -> None:
    assert sharpness(gain=0.05, greedy=0.02, spread=0.03)
    assert not sharpness(gain=0.05, greedy=0.026, spread=0.04)


# Clipping


def clipped(rloo: float, none: float) -> list[str]:
    return said(compared([*six(RLOO, grad_clipped=rloo), *six(NONE, grad_clipped=none)]), "Clipping")


def test_clipping_is_told_from_more_than_half_of_the_updates() -> None:
    (text,) = clipped(0.51, 0.5)
    assert "most updates of rloo (share of the updates: rloo 51%, none 50%)" in text
    assert text.endswith("do not take comparable steps.")
    assert clipped(0.5, 0.5) == []


def test_arms_that_are_all_clipped_take_comparable_steps() -> None:
    (text,) = clipped(0.9, 0.8)
    assert "most updates of rloo and none (" in text and "comparable" not in text


def test_runs_that_tell_no_clipping_are_left_out() -> None:
    untold = [replace(one, training={}) for one in six(NONE)]
    (text,) = said(compared([*six(RLOO, grad_clipped=0.9), *untold]), "Clipping")
    assert "none" not in text


# Edges of the grid of learning rates


@pytest.mark.parametrize(("rate", "side"), [(1e-3, "least"), (2e-3, ""), (4e-3, "greatest")])
def test_a_tuned_rate_at_the_edge_of_what_was_tried_is_told(rate: float, side: str) -> None:
    key = ("digits", "none")
    tried = {key: {1e-3: (0.5,), 2e-3: (0.5, 0.6), 4e-3: (0.4,)}}
    found = said(compared([*six(RLOO), *six(NONE)], rates={key: rate}, sensitivity=tried), "Learning rate")
    assert [f"the best one of none, {rate:g}, is the {side} that" in text for text in found] == [True] * bool(
        side
    )


def test_a_rate_that_was_not_tuned_is_at_no_edge() -> None:
    records, key = [*six(RLOO), *six(NONE)], ("digits", "none")
    assert said(compared(records, rates={key: 1e-3}), "Learning rate") == []
    alone = compared(records, rates={key: 1e-3}, sensitivity={key: {1e-3: (0.5,)}})
    assert said(alone, "Learning rate") == []


# Updates


@pytest.mark.parametrize(
    ("name", "below", "told", "words"),
    [
        (
            "skipped",
            0.049,
            0.05,
            "5% of the updates of none were skipped because the gradient was not finite",
        ),
        ("idle", 0.249, 0.25, "25% of the updates of none left the weights alone"),
    ],
)
def test_updates_without_effect_are_told_from_a_share_on(
    name: str, below: float, told: float, words: str
) -> None:
    assert said(compared([*six(RLOO), *six(NONE, **{name: below})]), "Updates") == []
    (text,) = said(compared([*six(RLOO), *six(NONE, **{name: told})]), "Updates")
    assert words in text


# Few pairs


def pairs(seeds: int, arms: int, **options: Any) -> list[str]:
    others = [arm(f"b{place}", baseline="none", baseline_constant=place) for place in range(arms - 1)]
    records = [
        record(of, seed, rising(0.5 + 0.1 * place + noise(seed, 0.002 * (place + 1))))
        for place, of in enumerate((RLOO, *others))
        for seed in range(seeds)
    ]
    return said(compared(records, arms=(RLOO, *others), **options), "Few pairs")


def test_few_pairs_are_told_where_the_test_cannot_reach_the_level() -> None:
    assert pairs(5, 2) == [
        "Few pairs: with 5 pairs the sign-flip test gives no p below 0.0625. So there is no verdict."
    ]
    assert pairs(6, 2) == []
    (text,) = pairs(6, 3)
    assert "with 6 pairs" in text and "below 0.0312," in text
    assert "none below 0.0625 for the clearest of 2 comparisons after Holm's adjustment" in text
    assert text.endswith("So the intervals decide, and not this p.")
    assert pairs(7, 3) == []
    assert "none below 0.0625 for the clearest of 4 comparisons" in pairs(7, 5)[0]
    assert "none below 1 for" in pairs(2, 4)[0]


def test_a_void_arm_still_counts_in_the_adjustment_but_alone_is_not_told() -> None:
    third = arm("mean", baseline="batch_mean")
    records = [*six(RLOO), *six(NONE, 0.9, clipped_ratio=0.9), *six(third, 0.9, 0.003)]
    found = compared(records, arms=(RLOO, NONE, third))
    assert found.judgement.families[0].differences[1].p_holm == pytest.approx(2 / 32)
    assert "for the clearest of 2 comparisons" in said(found, "Few pairs")[0]
    assert said(compared(records[:11], arms=(RLOO, NONE)), "Few pairs") == []
