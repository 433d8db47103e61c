"""What judge_scores finds in any table, and the sentences that say it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from tokenrl.lab import judge_scores
from tokenrl.lab.compare.statistics.found import Difference, Family
from tokenrl.lab.compare.statistics.words import headline, sentence

MIRRORED = {"better": "worse", "worse": "better"}
exact = st.integers(-256, 256).map(lambda k: k / 64)
"""Scores whose sums and differences are not rounded, so that what must be equal is so to the last digit."""
margins = st.sampled_from([None, 0.25, 1.0, 4.0])
few = settings(max_examples=40, deadline=None)


@st.composite
def tables(draw, arms=(2, 3, 4)):
    """Scores by arm and seed, with differences of several sizes, so that all verdicts occur."""
    names = [f"arm{i}" for i in range(draw(st.sampled_from(arms)))]
    count = draw(st.sampled_from([6, 7, 10, 5, 2]))
    above = {name: draw(st.sampled_from([-2.0, 0.0, 1.0])) for name in names}
    size = draw(st.sampled_from([0.0625, 0.25, 1.0, 0.0]))
    return {name: {s: draw(exact) * size + above[name] for s in range(count)} for name in names}


def rows(table):
    return [(arm, seed, score) for arm, scores in table.items() for seed, score in scores.items()]


def family(table, **options) -> Family:
    (found,) = judge_scores(rows(table) if isinstance(table, dict) else table, **options).families
    return found


def one(reference, arm, **options) -> Difference:
    """Judge two arms, given as the scores of seeds 0, 1, 2, ..."""
    table = {"ref": dict(enumerate(reference)), "arm": dict(enumerate(arm))}
    (found,) = family(table, **options).differences
    return found


@few
@given(tables(), margins, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(table, margin, random):
    mixed = rows(table)
    random.shuffle(mixed)
    first, second = (family(t, reference="arm0", margin=margin) for t in (table, mixed))
    assert {d.arm: d for d in first.differences} == {d.arm: d for d in second.differences}
    assert {a.arm: a.scores for a in first.arms} == {a.arm: a.scores for a in second.arms} == table


@few
@given(tables(), margins, st.lists(exact, min_size=10, max_size=10))
def test_what_a_seed_adds_to_all_arms_cancels(table, margin, added):
    shifted = {arm: {s: x + added[s] for s, x in scores.items()} for arm, scores in table.items()}
    assert family(shifted, margin=margin).differences == family(table, margin=margin).differences


@few
@given(tables(arms=(2,)), margins)
def test_two_arms_give_the_opposite_when_the_other_one_is_the_reference(table, margin):
    (there,) = family(table, reference="arm0", margin=margin).differences
    (back,) = family(table, reference="arm1", margin=margin).differences
    assert back.verdict == MIRRORED.get(there.verdict, there.verdict)
    for name in ("mean", "adjusted"):
        a, b = getattr(there, name), getattr(back, name)
        assert (b.value, b.low, b.high) == (-a.value, -a.high, -a.low)
    assert back.improvement == pytest.approx(
        (1 - there.improvement.value, 1 - there.improvement.high, 1 - there.improvement.low)
    )
    same = ("sd", "p_sign_flip", "p_holm", "level", "seeds_needed")
    assert [getattr(back, name) for name in same] == [getattr(there, name) for name in same]


@few
@given(tables(), margins, st.sampled_from([0.125, 0.5, 2.0, 1024.0]))
def test_other_units_of_score_and_margin_change_the_units_alone(table, margin, unit):
    scaled = {arm: {s: unit * x for s, x in scores.items()} for arm, scores in table.items()}
    found = family(scaled, margin=None if margin is None else unit * margin).differences
    for a, b in zip(family(table, margin=margin).differences, found, strict=True):
        assert b == replace(
            a,
            differences={s: unit * x for s, x in a.differences.items()},
            mean=type(a.mean)(*(unit * x for x in a.mean)),
            adjusted=type(a.adjusted)(*(unit * x for x in a.adjusted)),
            sd=unit * a.sd,
        )


@few
@given(tables(arms=(2,)), st.integers(1, 4))
def test_pairs_that_are_equal_dilute_the_difference_and_leave_the_sign_flip_test_alone(table, added):
    n = len(table["arm0"])
    more = {arm: {**scores, **{n + i: 0.5 for i in range(added)}} for arm, scores in table.items()}
    (before,), (after,) = family(table).differences, family(more).differences
    assert after.mean.value == pytest.approx(before.mean.value * n / (n + added))
    assert after.p_sign_flip == before.p_sign_flip
    assert abs(after.improvement.value - 0.5) <= abs(before.improvement.value - 0.5)


@few
@given(tables(), margins)
def test_a_verdict_is_what_the_interval_at_the_level_of_the_family_says(table, margin):
    found = family(table, margin=margin)
    p, count = sorted(d.p_sign_flip for d in found.differences), len(found.differences)
    stepped = [min(1.0, (count - rank) * value) for rank, value in enumerate(p)]  # Holm (1979)
    for d in found.differences:
        assert d.p_holm == max(stepped[: p.index(d.p_sign_flip) + 1])
        scores = [[table[arm][s] for s in d.differences] for arm in (d.arm, d.reference)]
        low, high = d.adjusted.low, d.adjusted.high
        if d.sd > 0:
            for level, ends in ((0.95, d.mean), (1 - 0.05 / len(found.differences), d.adjusted)):
                known = stats.ttest_rel(*scores).confidence_interval(level)
                assert (ends.low, ends.high) == pytest.approx((known.low, known.high), abs=1e-9)
        assert (d.verdict == "descriptive") == (len(d.differences) < 6)
        if d.verdict == "equivalent":
            assert margin is not None and -margin <= low and high <= margin
        elif d.verdict in MIRRORED:
            assert low > 0 if d.verdict == "better" else high < 0
            assert margin is None or low < -margin or high > margin
        elif d.verdict == "undecided":
            assert low <= 0 <= high and (margin is None or low < -margin or high > margin)
            assert d.seeds_needed is None or d.seeds_needed > len(d.differences)


@few
@given(tables(), margins)
def test_the_sentence_says_the_verdict_and_no_other(table, margin):
    found = family(table, margin=margin)
    for d in found.differences:
        check_words(sentence(d, margin), d.verdict)
        assert d.arm in headline(found) and d.reference in headline(found)


SAID = {
    "better": ("is better than",),
    "worse": ("is worse than",),
    "equivalent": ("are equivalent", "smaller than the margin"),
    "undecided": ("is undecided", "may be of either sign"),
    "descriptive": ("too few for a verdict",),
    "void": ("cannot be compared", "not valid"),
}


def check_words(text: str, verdict: str) -> None:
    for other, words in SAID.items():
        for word in words:
            assert (word in text) == (other == verdict), (verdict, text)
    for word in ("better", "worse", "equivalent"):
        assert (word in text) == (word == verdict), (verdict, text)


ZIGZAG = (0.1, -0.1, 0.2, -0.2, 0.1, -0.1)


@pytest.mark.parametrize(
    ("verdict", "differences", "options"),
    [
        ("better", [1 + x for x in ZIGZAG], {}),
        ("worse", [x - 1 for x in ZIGZAG], {}),
        ("better", [1 + x for x in ZIGZAG], {"margin": 0.5}),
        ("equivalent", [x / 10 for x in ZIGZAG], {"margin": 0.5}),
        (
            "equivalent",
            [0.2 + x / 10 for x in ZIGZAG],
            {"margin": 0.5},
        ),  # there is one, and it does not count
        ("undecided", ZIGZAG, {}),
        ("undecided", ZIGZAG, {"margin": 0.01}),
        ("descriptive", [1.0] * 5, {"margin": 0.5}),
        ("descriptive", [1.0], {}),
        ("void", [1 + x for x in ZIGZAG], {"void": {("", "arm"): "its entropy collapsed"}}),
        ("void", [1 + x for x in ZIGZAG], {"void": {("", "ref"): "half of its answers were cut"}}),
        ("void", [1.0], {"void": {("", "arm"): "it failed"}}),
    ],
)
def test_each_verdict_has_its_words(verdict, differences, options):
    found = one([0.0] * len(differences), differences, **options)
    assert found.verdict == verdict
    check_words(sentence(found, options.get("margin")), verdict)
    assert found.seeds_needed is None or verdict in ("undecided", "descriptive")


@pytest.mark.parametrize(("apart", "margin", "verdict"), [(0.25, None, "better"), (-0.25, None, "worse")])
def test_differences_without_variance_are_decided_if_they_are_differences(apart, margin, verdict):
    found = one([0.0] * 6, [apart] * 6, margin=margin)
    assert (found.verdict, found.sd, found.adjusted) == (verdict, 0, (apart, apart, apart))


def test_arms_without_any_difference_are_equivalent_within_a_margin_and_else_undecided_for_ever():
    same = one([0.5] * 6, [0.5] * 6)
    assert (same.verdict, same.seeds_needed, same.p_sign_flip) == ("undecided", None, 1)
    assert "no number of seeds" in sentence(same, None)
    assert one([0.5] * 6, [0.5] * 6, margin=0.01).verdict == "equivalent"
    assert one([0.5] * 3, [0.5] * 3, margin=0.01).seeds_needed == 6


def test_what_is_undecided_asks_for_more_seeds_than_there_were():
    """Here the six pairs that did not decide would have in 80 % of all cases."""
    values = np.array([1.0, -1.0, 1.0, -1.0, 0.5, -0.5])
    half = stats.t.ppf(0.975, 5) * values.std(ddof=1) / math.sqrt(6)
    found = one([0.0] * 6, values + 0.999 * half, margin=1.998 * half)
    assert (found.verdict, found.seeds_needed) == ("undecided", 7)


def test_a_seed_that_one_arm_lacks_is_left_out_of_its_pairs_and_named():
    table = {"ref": dict.fromkeys(range(8), 0.0), "arm": {s: 1 + s / 64 for s in range(8)}, "other": {}}
    table["other"] = dict(table["arm"])
    del table["arm"][3], table["ref"][5]
    arm, other = family(table).differences
    assert list(arm.differences) == [0, 1, 2, 4, 6, 7] and arm.unpaired == (3, 5)
    assert list(other.differences) == [0, 1, 2, 3, 4, 6, 7] and other.unpaired == (5,)
    assert sentence(arm, None).endswith("Seeds 3 and 5 are left out: only one of the two has them.")
    assert sentence(other, None).endswith("Seed 5 is left out: only one of the two has it.")
    assert arm.verdict == "better" and "left out" not in sentence(one([0.0] * 6, [1.0] * 6), None)
    del table["arm"][7]
    assert family(table).differences[0].verdict == "descriptive", "five pairs are left"


def test_a_void_arm_is_shown_without_a_verdict_and_changes_nothing_for_the_others():
    table = {arm: {s: i + s % 2 / 8 for s in range(6)} for i, arm in enumerate(("ref", "a", "b"))}
    plain, void = family(table), family(table, void={("", "a"): "cut", ("elsewhere", "b"): "not here"})
    assert [d.verdict for d in void.differences] == ["void", "better"]
    assert [a.void for a in void.arms] == ["", "cut", ""]
    assert void.differences[1] == plain.differences[1], "the level was planned for both"
    assert void.differences[0].mean == plain.differences[0].mean


def test_the_reference_against_itself_belongs_to_no_family():
    table = {arm: {s: float(s % 3) for s in range(6)} for arm in ("ref", "a", "b")}
    alone, beside = family(table), family(table, itself={"": {100 + s: s / 8 for s in range(6)}})
    assert beside.differences == alone.differences and alone.itself is None
    assert beside.itself is not None and beside.itself.level == 0.95
    assert beside.itself.mean == beside.itself.adjusted
    assert list(beside.itself.differences.values()) == [s / 8 - s % 3 for s in range(6)]


def test_every_problem_is_a_family_with_a_margin_of_its_own():
    table = [(arm, s, i * 0.1, p) for p in ("sort", "add") for i, arm in enumerate("ab") for s in range(6)]
    found = judge_scores(table, margin={"sort": 0.5, "add": None})
    assert found.verdicts() == {("sort", "b"): "equivalent", ("add", "b"): "better"}
    assert [f.margin for f in found.families] == [0.5, None]
