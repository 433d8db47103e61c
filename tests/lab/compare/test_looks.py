"""Looks that share the error of a comparison: their levels by two ways, and comparisons that stop early."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from folders import RECIPES, read_json
from made_runs import WALK, rising, write_missing
from refusals import refused, stopped
from scipy import stats

import tokenrl
from tokenrl.lab import judge_scores
from tokenrl.lab.compare import loop
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.intervals import ALPHA
from tokenrl.lab.compare.looks import error_of_looks, levels_of_looks, spent
from tokenrl.lab.compare.loop import compare_each, judge_directory
from tokenrl.settings import arguments

FOUR = (4, 8, 12, 16)


def test_the_bounds_are_those_of_the_literature():
    """Four looks at .05 with the spending function of O'Brien and Fleming; two and four looks at .05 each."""
    bounds = stats.norm.isf(np.array(levels_of_looks(FOUR, 0.05)) / 2)
    assert bounds == pytest.approx([4.3326, 2.9631, 2.3590, 2.0141], abs=1e-4)
    assert error_of_looks((8, 16), 0.05) == pytest.approx(0.0831, abs=1e-4)
    assert error_of_looks(FOUR, 0.05) == pytest.approx(0.126, abs=5e-4)
    assert levels_of_looks((7,), 0.05) == (0.05,)


@pytest.mark.parametrize("looks", [FOUR, (6, 7, 20), (8, 12)], ids=str)
def test_what_is_spent_is_what_simulated_sums_find(looks):
    """The integration, against sums of normal numbers that are drawn."""
    draw = np.random.default_rng(0)
    sums = draw.standard_normal((400_000, looks[-1])).cumsum(axis=1)
    stopped = np.zeros(len(sums), dtype=bool)
    for look, level in zip(looks, levels_of_looks(looks, 0.05), strict=True):
        stopped |= abs(sums[:, look - 1]) > stats.norm.isf(level / 2) * look**0.5
        expected = spent(look / looks[-1], 0.05)
        error = 4 * (expected * (1 - expected) / len(sums)) ** 0.5
        assert stopped.mean() == pytest.approx(expected, abs=error)
    assert spent(1.0, 0.05) == pytest.approx(0.05)


def test_a_look_at_next_to_nothing_spends_nothing():
    assert levels_of_looks((2, 1000), 0.05) == pytest.approx((0.0, 0.05))


@pytest.mark.parametrize(
    ("looks", "percent"), [((6, 12, 18), 5.1), ((8, 12, 16), 5.2), ((6, 7, 8, 9, 10, 11, 12), 5.6)]
)
def test_the_page_says_how_often_student_t_errs_at_looks(looks, percent):
    """Looks at fewer than six seeds spend nothing, so 4, 8, 12 and 16 are 8, 12 and 16."""
    sample = np.random.default_rng(0).standard_normal((200_000, looks[-1]))
    stopped = np.zeros(len(sample), dtype=bool)
    for look, level in zip(looks, levels_of_looks(looks, 0.05), strict=True):
        seen = sample[:, :look]
        t = seen.mean(1) / seen.std(1, ddof=1) * look**0.5
        stopped |= abs(t) > stats.t.isf(level / 2, look - 1)
    assert 100 * stopped.mean() == pytest.approx(percent, abs=0.2)
    page = (RECIPES / "pages" / "explain" / "comparing.md").read_text()
    assert f"{percent} %" in page.partition("## Looks")[2].partition("##")[0]


def scores(*arms):
    """Rows of arms whose scores by seed are given."""
    return [(f"arm{i}", seed, x) for i, arm in enumerate(arms) for seed, x in enumerate(arm)]


def test_the_first_look_that_decides_stands_and_its_interval_has_its_level():
    draw = np.random.default_rng(1)
    reference = draw.normal(size=16)
    clear = reference + 2 + 0.1 * draw.normal(size=16)
    unclear = reference + draw.normal(size=16)
    later = clear.copy()
    later[8:] -= 9  # what comes after the verdict does not count
    looks = (8, 16)
    (family,) = judge_scores(scores(reference, later, unclear), looks=looks).families
    first, second = family.differences
    assert (first.verdict, first.look) == ("better", 8)
    assert second.look == 16 and family.undecided == {"arm0", "arm2"}
    assert "Decided after 8 seeds." in family.sentences()[0]
    assert "Looked at last after 16 seeds." in family.sentences()[1]
    for difference, number in ((first, 0), (second, 1)):
        level = 1 - levels_of_looks(looks, ALPHA / 2)[number]
        values = np.array([*difference.differences.values()])
        interval = stats.ttest_1samp(values, 0).confidence_interval(level)
        assert difference.adjusted[1:] == pytest.approx((interval.low, interval.high))


def test_with_one_look_the_rule_is_that_of_fixed_seeds():
    draw = np.random.default_rng(2)
    table = scores(draw.normal(size=9), draw.normal(size=9) + 1)
    assert judge_scores(table, looks=(9,)) == judge_scores(table)


def test_a_look_at_fewer_than_six_seeds_decides_nothing_and_spends_nothing():
    draw = np.random.default_rng(3)
    reference = draw.normal(size=12)
    table = scores(reference, reference + 0.5 + 0.1 * draw.normal(size=12))
    with_early, without = (
        judge_scores(table, looks=looks).families[0].differences[0]
        for looks in ((4, 8, 12), (8, 12))
    )
    assert with_early == without and with_early.look == 8


def clear(run):
    """A run of an arm that is clearly better, or of one whose difference follows the seed."""
    noise = 0.01 * np.random.default_rng([run.seed, len(run.arm)]).normal()
    end = {"reinforce": 0.5, "a2c": 0.9, "rloo": 0.5 + 0.004 * run.seed}[run.arm]
    return rising(end + noise)(run.seed)


def test_decided_arms_make_no_more_runs_and_a_killed_comparison_goes_on_to_the_same(
    tmp_path, monkeypatch
):
    settings = WALK | {"arms": ("reinforce", "a2c", "rloo"), "seeds": (6, 9, 12)}
    made = set()
    kill_at = [0]

    def of_run(run):
        if 0 < kill_at[0] <= run.seed:
            raise KeyboardInterrupt
        made.add((run.arm, run.seed))
        return clear(run)

    monkeypatch.setattr(loop, "execute", partial(write_missing, of_run=of_run))
    results = []
    for name, moments in (("whole", [0]), ("killed", [8, 0])):
        made.clear()
        for kill_at[0] in moments:
            try:
                results.append(tokenrl.compare(**settings, output_dir=tmp_path / name))
            except KeyboardInterrupt:
                partly = judge_directory(tmp_path / name)
                assert partly.family.differences[1].look == 6
        seeds = {arm: sum(1 for other, _ in made if other == arm) for arm in settings["arms"]}
        assert seeds["a2c"] == 6 and seeds["reinforce"] == seeds["rloo"] > 6
    whole, killed = results
    assert whole.judgement == killed.judgement
    assert whole.judgement.verdicts()["walk", "a2c"] == "better"
    assert "of 36 runs were made" in whole.words.headline


def test_code_that_is_changed_between_two_looks_is_noticed(tmp_path, monkeypatch):
    settings = WALK | {
        "arms": ("reinforce", "a2c"),
        "seeds": (6, 9),
        "output_dir": tmp_path / "run",
    }

    def of_run(run):
        config = {"hashes": {"module rewards": "1" if run.seed < 6 else "2"}}
        return rising(0.5, config=config)(run.seed)

    monkeypatch.setattr(loop, "execute", partial(write_missing, of_run=of_run))
    with refused(
        "seed_0 and .*seed_6 cannot be compared, as they differ in hash of module rewards"
    ):
        tokenrl.compare(**settings)
    with refused("differ in hash of module rewards"):
        judge_directory(tmp_path / "run")


def test_runs_that_were_judged_are_collected_by_their_look_alone(tmp_path, monkeypatch):
    """Twelve seeds that take over six runs which had a verdict are two looks, wherever the six seeds lie."""
    monkeypatch.setattr(loop, "execute", write_missing)
    arms = WALK | {"arms": ("reinforce", "a2c")}
    for name, options in {
        "six": {"seeds": 6},
        "later": {"seeds": 6, "first_seed": 6},
        "five": {"seeds": 5},
    }.items():
        tokenrl.compare(**arms, **options, output_dir=tmp_path / name)
    for name in ("six", "later"):
        with refused(
            "judged after 6 seeds. Who looks after 6 seeds, and again after 12, .*fewer than 6 seeds each"
        ):
            tokenrl.compare(**arms, seeds=12, collect=tmp_path / name, output_dir=tmp_path / "all")
    for name, seeds in (("five", 12), ("six", (6, 12))):
        output_dir = tmp_path / f"with_{name}"
        tokenrl.compare(**arms, seeds=seeds, collect=tmp_path / name, output_dir=output_dir)


def test_a_program_reads_the_verdict_from_a_file_and_from_the_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "execute", partial(write_missing, of_run=clear))
    settings = WALK | {
        "arms": ("reinforce", "a2c"),
        "seeds": (6, 9),
        "output_dir": str(tmp_path / "run"),
    }
    codes = []
    for require in ("better:a2c", "better|equivalent:a2c", "worse:a2c", None):
        options = settings | {"require": require, "json": str(tmp_path / "verdict.json")}
        args = arguments(CompareArguments, with_shared(options))
        codes.append(compare_each(args))
    assert codes == [0, 0, 3, 0]
    record = read_json(tmp_path / "run" / "comparison.json")
    (comparison,) = record["comparisons"]
    assert (record["schema"], record["runs"]) == (1, {"planned": 18, "made": 12, "failed": 0})
    assert (comparison["verdict"], comparison["look"], comparison["pairs"]) == ("better", 6, 6)
    assert comparison["low"] < comparison["value"] < comparison["high"]
    assert comparison["pairs_for_verdict"] == 6 and record == read_json(tmp_path / "verdict.json")
    for file, words in {
        "verdict.json": "json names one file",
        "no/v.json": "cannot be written",
    }.items():
        with refused(words):
            CompareArguments(env=("walk", "bandit"), json=file)
    for require in ("best:a2c", "better:rloo", "better:reinforce", "a2c"):
        with refused("require was given as .*one of the arms a2c"):
            tokenrl.compare(**settings | {"require": require})


def test_seeds_that_are_added_after_a_look_are_named_for_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "execute", lambda runs, root, **options: None)
    settings = WALK | {"arms": ("reinforce", "a2c"), "output_dir": str(tmp_path / "run")}
    with stopped("Nothing can be judged"):
        tokenrl.compare(**settings, seeds=8)
    words = (
        r"after 8 seeds, and again after 16, .* in 8.3% of comparisons instead of 5%.*--seeds 8 16"
    )
    with refused(words):
        tokenrl.compare(**settings, seeds=16)
    with refused(r"another comparison: .*another --output-dir\.$"):
        tokenrl.compare(**settings | {"max_steps": 51}, seeds=16)


@pytest.mark.parametrize("seeds", [(8, 6), (6, 6), ()], ids=str)
def test_looks_that_do_not_rise_are_refused(seeds, tmp_path):
    with refused("seeds was given as .*that rise"):
        tokenrl.compare(**WALK | {"seeds": seeds}, output_dir=tmp_path / "run", dry_run=True)
