"""Verdicts of judge_scores on any table, and their sentences."""

import math
import re

import pytest
from hypothesis import given, settings, strategies as st
from scipy import stats

from tokenrl.errors import Refused
from tokenrl.lab import judge_scores
from tokenrl.lab.compare.judgement import Family, PairedDifference

MIRRORED = {"better": "worse", "worse": "better"}
exact = st.integers(-256, 256).map(lambda k: k / 64)
"""Scores whose sums and differences are not rounded."""
margins = st.sampled_from([None, 0.25, 1.0, 4.0])
few = settings(max_examples=15, deadline=None)
ZIGZAG = (0.1, -0.1, 0.2, -0.2, 0.1, -0.1)
RISING = {arm: {s: i + s % 2 * i / 8 for s in range(6)} for i, arm in enumerate(("ref", "a", "b"))}
"""Scores of three arms, each better than the arm before it."""


@st.composite
def tables(draw, arms=(2, 3)):
    """Scores by arm and seed, with differences of several sizes, so that all verdicts occur."""
    names = [f"arm{i}" for i in range(draw(st.sampled_from(arms)))]
    count = draw(st.sampled_from([6, 7, 10, 5, 2]))
    above = {name: draw(st.sampled_from([-2.0, 0.0, 1.0])) for name in names}
    size = draw(st.sampled_from([0.0625, 0.25, 1.0, 0.0]))
    return {name: {s: draw(exact) * size + above[name] for s in range(count)} for name in names}


def rows(table):
    result = []
    for arm, scores in table.items():
        result += [(arm, seed, score) for seed, score in scores.items()]
    return result


def family(table, **options) -> Family:
    (result,) = judge_scores(rows(table) if isinstance(table, dict) else table, **options).families
    return result


def judge_two(reference, arm, **options) -> tuple[PairedDifference, str]:
    """Judge two arms, given as the scores of seeds 0, 1, 2, ...; return the difference and its sentence."""
    result = family({"ref": dict(enumerate(reference)), "arm": dict(enumerate(arm))}, **options)
    return result.differences[0], result.sentences()[0]


@few
@given(tables(), margins, st.randoms(use_true_random=False))
def test_a_verdict_is_what_the_interval_at_the_level_of_the_family_says(table, margin, random):
    mixed = rows(table)
    random.shuffle(mixed)
    result = family(mixed, reference="arm0", margin=margin)
    for d in result.differences:
        scores = [[table[arm][s] for s in d.differences] for arm in (d.arm, d.reference)]
        low, high = d.adjusted[1:]
        if low < high:
            level = 1 - 0.05 / len(result.differences)
            expected = stats.ttest_rel(*scores).confidence_interval(level)
            assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)
        assert (d.verdict == "descriptive") == (len(d.differences) < 6)
        within = margin is not None and -margin <= low < high <= margin
        if d.verdict == "equivalent":
            assert within
        elif d.verdict in MIRRORED:
            assert 0 < low < high if d.verdict == "better" else low < high < 0
            assert not within
        elif d.verdict == "undecided":
            assert low == high or (low <= 0 <= high and not within)
        check_words(next(text for text in result.sentences() if f"{d.arm} " in text), d.verdict)
        assert d.arm in result.headline() and d.reference in result.headline()


PHRASES = {
    "better": "is better than",
    "worse": "is worse than",
    "equivalent": "are equivalent",
    "undecided": "is undecided",
    "descriptive": "too few for a verdict",
}


def check_words(text: str, verdict: str) -> None:
    assert [each for each, words in PHRASES.items() if words in text] == [verdict], text
    assert "No run of either failed" in text


@pytest.mark.parametrize(
    ("verdict", "differences", "options"),
    [
        ("worse", [x - 1 for x in ZIGZAG], {}),
        ("better", [1 + x for x in ZIGZAG], {"margin": 0.5}),
        ("equivalent", [x / 10 for x in ZIGZAG], {"margin": 0.5}),
        (
            "equivalent",
            [0.2 + x / 10 for x in ZIGZAG],
            {"margin": 0.5},
        ),  # it is one, and does not count
        ("undecided", ZIGZAG, {}),
        ("descriptive", [1.0] * 5, {"margin": 0.5}),
    ],
)
def test_each_verdict_has_its_words(verdict, differences, options):
    result, text = judge_two([0.0] * len(differences), differences, **options)
    assert result.verdict == verdict
    check_words(text, verdict)


@pytest.mark.parametrize("apart", [0.0, 0.1])
def test_an_interval_of_width_zero_decides_nothing(apart):
    """Six equal differences show no spread; .1 is rounded differently in each pair of scores."""
    reference = [0.0, 0.1, 0.2, 0.3, 0.4, 0.7]
    result, text = judge_two(reference, [x + apart for x in reference], margin=0.5)
    assert result.verdict == "undecided"
    assert result.adjusted.low == result.adjusted.high
    assert "does not show how they vary" in text


@pytest.mark.parametrize(
    ("apart", "margin"), [(0.3, None), (2.0, None), (0.0, 0.6), (0.9, 0.6), (0.01, None)]
)
def test_the_pairs_for_a_verdict_are_the_least_with_which_such_scores_have_one(apart, margin):
    def judged(pairs):
        """Judge differences whose mean and standard deviation are the same for any even number of pairs."""
        step = math.sqrt((pairs - 1) / pairs)
        return judge_two([0.0] * pairs, [apart + step, apart - step] * (pairs // 2), margin=margin)

    difference, sentence = judged(8)
    least = difference.pairs_for_verdict
    if least is None:
        assert "more than 1,000 seeds would decide" in sentence
        return
    even = least + least % 2
    assert judged(even)[0].is_decided and (even == 6 or not judged(even - 2)[0].is_decided)
    assert difference.is_decided or f"{least} seeds would decide" in sentence


def test_every_verdict_says_which_failure_rates_are_not_excluded():
    assert (
        "does not exclude that up to 39% would" in judge_two([0.0] * 6, [1 + x for x in ZIGZAG])[1]
    )
    assert "up to 14% would" in judge_two([0.0] * 20, [1 + x for x in (ZIGZAG * 4)[:20]])[1]


def test_failures_are_counted_and_the_difference_is_that_of_the_others():
    scores = [0.1, *(1 + x for x in ZIGZAG)]
    result, text = judge_two([1.2] * 6 + [0.2], scores, failure_below=0.5)
    assert list(result.differences) == [1, 2, 3, 4, 5]
    assert result.level == 0.975, "two parts share the level"
    assert result.p_failures == pytest.approx(1.0) and result.verdict == "descriptive"
    assert "1 of 7 runs of arm failed [1%, 52%] and 1 of 7 runs of ref failed" in text


@pytest.mark.parametrize(
    ("failures", "shift", "verdict", "words"),
    [
        (6, -0.5, "worse", "because it fails more often"),
        (6, 0.5, "undecided", "one fails more often, and the other is worse where neither fails"),
        (1, -0.5, "worse", "arm is worse than ref, by -0.499 [-0.509"),
        (1, 0.5, "better", "arm is better than ref, by +0.501 [0.491"),
    ],
)
def test_an_arm_that_fails_more_often_is_not_better(failures, shift, verdict, words):
    reference = [1.0] * 14
    arm = [0.0] * failures + [1 + shift + x / 10 for x in (ZIGZAG * 3)[: 14 - failures]]
    result, text = judge_two(reference, arm, failure_below=0.2)
    assert result.verdict == verdict and words in text
    table = [[failures, 14 - failures], [0, 14]]
    assert result.p_failures == pytest.approx(stats.fisher_exact(table).pvalue)
    mirrored, text = judge_two(arm, reference, failure_below=0.2)
    assert mirrored.verdict == MIRRORED.get(verdict, verdict)
    assert ("because it fails less often" in text) == ("because" in words)


def failing(count, failures, base=0.0):
    """Scores by seed of which the first are failures below .2."""
    return {s: 0.0 if s < failures else 1 + base + ZIGZAG[s % 6] / 10 for s in range(count)}


@pytest.mark.parametrize(("arms", "verdict"), [(1, "worse"), (3, "undecided")])
def test_failures_share_the_level_of_the_family(arms, verdict):
    """Five failures of eight have p = .026 against none: below .05 / 2, and above .05 / 6."""
    table = {"ref": failing(8, 0)} | {
        f"arm{i}": failing(8, 6 if arms == 1 else 5) for i in range(arms)
    }
    first = family(table, failure_below=0.2).differences[0]
    level = 0.05 / arms / 2
    assert (first.p_failures <= level) == (verdict == "worse") and first.p_failures < 0.05
    assert first.more_failures == ("arm0" if verdict == "worse" else "")


def test_failures_of_fewer_than_six_pairs_decide_nothing():
    (difference,) = family(
        {"ref": failing(5, 0), "arm": failing(5, 5)}, failure_below=0.2
    ).differences
    assert difference.p_failures < 0.01 and difference.verdict == "descriptive"


def test_of_two_arms_the_larger_failure_rate_that_is_not_excluded_is_told():
    table = {"ref": failing(20, 0), "arm": failing(6, 0, 1.0)}
    for names in (("ref", "arm"), ("arm", "ref")):
        (text,) = family({name: table[name] for name in names}).sentences()
        assert "does not exclude that up to 39% would" in text


def test_arms_of_which_all_runs_failed_are_worse_and_need_no_scores():
    table = [("ref", s, 1 + s / 8) for s in range(8)] + [("arm", s, math.nan) for s in range(8)]
    marked = [{"arm": a, "seed": s, "score": x, "failed": a == "arm"} for a, s, x in table]
    (result,) = family(marked).differences
    assert result.verdict == "worse" and result.differences == {}


def test_a_seed_that_one_arm_lacks_is_left_out_of_its_pairs_and_named():
    table = {name: {s: x + s / 64 for s in range(8)} for name, x in (("ref", 0), ("arm", 1))}
    del table["arm"][3], table["ref"][5]
    result = family(table)
    (arm,) = result.differences
    assert list(arm.differences) == [0, 1, 2, 4, 6, 7] and arm.unpaired == (3, 5)
    assert result.sentences()[0].endswith("only one of the two has them: seeds 3 and 5.")


def test_all_pairs_share_one_level():
    judged = judge_scores(rows(RISING), all_pairs=True)
    (result,) = judged.families
    assert [(d.arm, d.reference) for d in result.differences] == [
        ("a", "ref"),
        ("b", "ref"),
        ("b", "a"),
    ]
    assert [d.level for d in result.differences] == pytest.approx([1 - 0.05 / 3] * 3)
    assert judged.verdicts() == {("", "a"): "better", ("", "b"): "better"}
    assert list(judged.table()["verdict"]) == ["better"] * 3


def test_every_problem_is_a_family_of_its_own():
    table = []
    for seed in range(6):
        for problem, rise in (("sort", 0), ("add", 100)):
            table += [("a", seed, 0.0, problem), ("b", seed, rise + seed / 100, problem)]
    result = judge_scores(table, margin=0.5)
    assert result.verdicts() == {("sort", "b"): "equivalent", ("add", "b"): "better"}


def test_a_table_may_be_a_frame_mappings_or_tuples():
    import pandas as pd

    runs = [("None", s, s / 8) for s in range(6)] + [("b", s, s / 8 + s) for s in range(6)]
    frame = pd.DataFrame(runs, columns=["arm", "seed", "accuracy"])
    judged = judge_scores(frame, metric="accuracy")
    assert judged.families == judge_scores(iter(runs)).families and judged.metric == "accuracy"
    assert judge_scores(frame.to_dict("records"), metric="accuracy") == judged


@pytest.mark.parametrize("word", [True, "True", "true", 1, "1"])
def test_a_run_that_failed_may_be_marked_in_the_ways_of_files(word):
    marks = {"ref": False, "arm": word}
    table = [
        {"arm": a, "seed": s, "score": s / 8, "failed": marks[a]} for a in marks for s in range(8)
    ]
    arms = {arm.arm: len(arm.failed) for arm in family(table).arms}
    assert arms == {"ref": 0, "arm": 8}
    texts = [{**row, "failed": "" if row["arm"] == "ref" else row["failed"]} for row in table]
    assert family(texts) == family(table)


GOOD = [("ppo", seed, 0.5) for seed in range(6)] + [("rloo", seed, 0.5) for seed in range(6)]


@pytest.mark.parametrize(
    ("table", "options", "words"),
    [
        ([*GOOD, ("ppo", 6, math.nan)], {}, "Row 12, arm 'ppo', seed 6, has no finite score"),
        ([*GOOD, ("ppo", 3, 0.1)], {}, "Row 12, arm 'ppo', seed 3, is there a second time"),
        ([("ppo", s, 0.5) for s in range(6)], {}, "only the arm 'ppo'; give two arms or more"),
        (GOOD, {"reference": "rlo"}, "'rlo'. Did you mean 'rloo'"),
        (GOOD, {"margin": 0}, "margin was given as 0"),
        ([{"arm": "ppo"}], {}, "it needs a row for each run, with arm, seed and score"),
        ([("ppo", 0, 0.5), ("rloo", 1, 0.5)], {}, "no seed in common"),
        ([("ppo", 0.5, 0.5)], {}, "no whole number as its seed"),
        ([*GOOD, (None, 0, 0.5)], {}, "Row 12, arm '', seed 0, has no arm"),
        (
            [{"arm": "a", "seed": 0, "score": 1, "failed": "OOM"}],
            {},
            "neither True nor False in its",
        ),
        (GOOD, {"looks": (8, 6)}, "looks was given as (8, 6); give .* that rise"),
        (GOOD, {"looks": (2.5, 6)}, "looks was given as (2.5, 6); it must be"),
    ],
)
def test_a_table_that_cannot_be_judged_is_refused(table, options, words):
    with pytest.raises(Refused) as refused:
        judge_scores(table, **options)
    assert re.search(re.escape(words).replace(r"\.\*", ".*"), str(refused.value))
