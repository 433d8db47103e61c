"""What a comparison reads from its runs and says of them, with runs that are written by hand."""

import math
import shutil

import numpy as np
import pytest
from folders import read_json
from made_runs import WALK, caveats_of, compared, noise, planned, rising, write_missing, write_run
from refusals import stopped

import tokenrl
from tokenrl.files import write_json
from tokenrl.lab.compare.loop import best_rates, judge_directory
from tokenrl.lab.compare.page import write_comparison
from tokenrl.lab.compare.table import read_runs
from tokenrl.runs.directory import RunDirectory

REWARDS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8)


def rewards(*values, **options):
    return lambda seed: {"rewards": list(values), **options}


def row(comparison, arm, seed=0):
    runs = comparison.of("comparison")
    return runs[(runs["arm"] == arm) & (runs["seed"] == seed)].iloc[0]


def curve(comparison, arm, seed=0):
    return list(row(comparison, arm, seed)["curve"]["reward"])


def test_scores_are_those_of_the_evaluations_without_that_before_training(tmp_path):
    greedy = [1 - x for x in REWARDS]
    arms = {"reinforce": rewards(*REWARDS, greedy=greedy), "a2c": rewards(*REWARDS)}
    comparison = compared(tmp_path, arms, seeds=2)
    run = row(comparison, "reinforce")
    assert (run["state"], run["reason"], run["samples"], run["failed"]) == (
        "finished",
        "",
        400,
        False,
    )
    assert curve(comparison, "reinforce") == pytest.approx(REWARDS)
    assert run["area"] == pytest.approx(0.5) and run["reward"] == 0.8
    assert run["area_greedy"] == pytest.approx(0.5) and run["reward_greedy"] == pytest.approx(0.2)
    assert run["entropy"] == pytest.approx(0.4) and run["grad_clipped"] == pytest.approx(0.2)


def test_an_arm_with_more_samples_per_step_is_read_at_the_budget(tmp_path):
    """Ten samples per step, and eight for the others: evaluations at 100, 200, 300, 400 and 500 samples.

    The steps after the 40th, which reaches the budget of 400, tell nothing of its training.
    """
    larger = rewards(
        *REWARDS, counts=lambda step: {"episodes": 10, "entropy": 0.4 if step < 40 else step}
    )
    comparison = compared(tmp_path, {"reinforce": rewards(*REWARDS), "a2c": larger}, seeds=2)
    expected = [0.1, 0.1 + 0.1 * 0.8, 0.2 + 0.1 * 0.6, 0.3 + 0.2 * 0.4, 0.5 + 0.2 * 0.2, 0.7]
    assert curve(comparison, "a2c") == pytest.approx(expected)
    run = row(comparison, "a2c")
    assert (run["samples"], run["reward"]) == (500, pytest.approx(0.7))
    assert run["area"] == pytest.approx(np.mean(expected[1:]))
    assert run["entropy"] == pytest.approx((3 * 0.4 + 40) / 4), "the mean of steps 37 to 40"


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    """A comparison in which all runs of an arm end early."""
    folder = tmp_path_factory.mktemp("early")
    compared(folder, {"reinforce": rewards(*REWARDS), "a2c": rewards(0.1, 0.2, 0.3)}, seeds=2)
    return folder


@pytest.mark.parametrize(
    ("summary", "state", "reason"),
    [
        ({"exit_reason": "failed", "error": "The loss is nan."}, "failed", "The loss is nan."),
        ({}, "failed", "It was ended from outside, as for want of memory."),
        (
            {"exit_reason": "SIGTERM"},
            "stopped",
            "SIGTERM stopped it; the same command goes on with it.",
        ),
        *(
            ({"exit_reason": name}, "finished", "")
            for name in ("stuck", "no-improvement", "callback")
        ),
    ],
)
def test_a_run_that_ends_early_keeps_its_last_evaluation(early, summary, state, reason):
    file = early / "runs/walk/a2c/seed_0/summary.json"
    file.unlink(missing_ok=True)
    if summary:
        write_json(file, summary)
    run = row(judge_directory(early), "a2c")
    assert (run["state"], run["reason"]) == (state, reason)
    assert run["failed"] == (state == "failed")
    assert run["reward"] == 0.3 and run["area"] == pytest.approx((0.2 + 4 * 0.3) / 5)


def test_a_run_below_a_stated_reward_failed(tmp_path):
    arms = {"reinforce": rising(0.5), "a2c": lambda seed: rising(0.1 if seed else 0.9)(seed)}
    comparison = compared(tmp_path, arms, seeds=6, failure_below=0.2)
    assert comparison.judgement.verdicts() == {("walk", "a2c"): "worse"}
    assert "because it fails more often" in comparison.family.sentences()[0]
    assert row(comparison, "a2c", 1)["reason"].startswith("Its reward at the end, ")
    assert comparison.exit_code == 0, "a run that ended is no error"


def test_clipped_updates_qualify_the_headline(tmp_path):
    def slow(seed):
        run = [0, 0.3 + noise(seed, 0.003), 0.5, 0.7, *[0.995 + noise(seed)] * 2]
        return {"rewards": run, "grad_clipped": 0.97}

    comparison = compared(
        tmp_path, {"reinforce": rising(0.995), "a2c": slow}, env="CartPole-v1", margin=0.001
    )
    assert caveats_of(comparison, "Ceiling") == [], (
        "500 counts as solved there, and nothing was declared as the best"
    )
    assert "Worse than reinforce: a2c. But most updates were clipped" in comparison.words.headline


def test_each_arm_is_compared_at_its_best_rate_and_an_edge_is_told(tmp_path):
    """One arm is the better the larger its rate, the other best in the middle; the third tries none."""
    arms = ("reinforce", "a2c,learning_rate=(.1,.2,.4)", "rloo,learning_rate=.3")
    options = {**WALK, "learning_rate": "tuned", "seeds": 2, "arms": arms}
    plan = planned({**options, "output_dir": str(tmp_path)})
    usual = plan.arms[0].rates[2]
    best = {"reinforce": 4 * usual, arms[1]: 0.2, arms[2]: 0.3}

    def make(runs):
        for run in runs:
            end = 1 - abs(math.log2(run.settings["learning_rate"] / best[run.arm]))
            write_run(tmp_path / run.path, **rising(end)(run.seed))
        return read_runs(plan, runs, tmp_path)

    tuning = plan.tuning_runs()
    assert [run.arm for run in tuning] == [arms[0]] * 15 + [arms[1]] * 9
    assert {run.seed for run in tuning}.isdisjoint(plan.seeds)
    make(plan.runs(best_rates(make(tuning), plan.metric)))
    comparison = judge_directory(tmp_path)
    assert {arm: row(comparison, arm)["learning_rate"] for arm in arms} == pytest.approx(best)
    (edge,) = caveats_of(comparison, "Learning rate")
    assert "rate of reinforce" in edge and "is the least or the greatest that was tried" in edge


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({0.1: [1.0, 0.0], 0.2: [0.9, 0.9]}, 0.2),  # the mean over the seeds decides
        ({0.2: [1.0, 1.0], 0.1: [1.0, 1.0]}, 0.1),  # of equal rates the smaller
        ({0.1: [9.0, math.nan], 0.2: [-1.0, -2.0]}, 0.2),  # a run without a score is the worst
    ],
)
def test_the_best_rate_has_the_best_mean(scores, best):
    rows = [
        {"arm": "a", "learning_rate": rate, "area": score}
        for rate in scores
        for score in scores[rate]
    ]
    other = {"arm": "b", "learning_rate": 7.0, "area": 0.0}
    assert best_rates([*rows, other], "area") == {"a": best, "b": 7.0}
    assert best_rates([], "area") == {}


def test_runs_that_have_not_ended_are_neither_judged_nor_failures(tmp_path):
    """Of one arm all runs have ended; of the other one is under way, one was stopped, and one has not begun."""
    arms = {"reinforce": rising(0.5), "a2c": rising(0.9), "rloo": rising(0.6)}
    compared(tmp_path, arms, seeds=8)
    folder = tmp_path / "runs/walk/a2c"
    (folder / "seed_1/summary.json").unlink()
    directory = RunDirectory(folder / "seed_1", may_hold_run=True)
    write_json(folder / "seed_2/summary.json", {"exit_reason": "SIGTERM"})
    shutil.rmtree(folder / "seed_3")
    comparison = judge_directory(tmp_path)
    states = [row(comparison, "a2c", seed)["state"] for seed in range(4)]
    assert states == ["finished", "running", "stopped", "absent"]
    assert not comparison.runs["failed"].any()
    assert comparison.counts == {"planned": 24, "made": 21, "failed": 0}
    (a2c, _) = comparison.family.differences
    assert a2c.unpaired == (1, 2, 3) and a2c.p_failures == 1.0
    write_comparison(comparison)
    directory.release()


@pytest.mark.drawn
def test_an_arm_whose_runs_fail_before_their_first_row_is_worse_and_has_a_report(tmp_path):
    arms = {"reinforce": rising(0.5), "a2c": lambda seed: {}}
    plan = planned({**WALK, "arms": tuple(arms), "output_dir": str(tmp_path)})
    for run in plan.runs({}):
        path = tmp_path / run.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(f"{path.name}.log").write_text("No memory.")
        if run.arm == "reinforce":
            write_run(path, **rising(0.5)(run.seed))
    comparison = judge_directory(tmp_path)
    assert comparison.judgement.verdicts() == {("walk", "a2c"): "worse"}
    assert row(comparison, "a2c")["reason"] == "No memory."
    assert "a2c" in write_comparison(comparison).read_text("utf-8")
    assert read_json(tmp_path / "comparison.json")["runs"]["failed"] == 6


def test_nothing_to_judge_is_told_with_the_reason(tmp_path):
    broken = {"exit_reason": "failed", "error": "No memory."}
    arms = {arm: rewards(math.nan, summary=broken) for arm in ("reinforce", "a2c")}
    with stopped("Nothing can be judged on walk: no run has area. No memory."):
        compared(tmp_path / "failed", arms, seeds=2)
    with stopped("two arms need runs that have ended. It has not begun."):
        compared(tmp_path / "begun", {"reinforce": rising(0.5), "a2c": lambda seed: {}}, seeds=2)


FLAGGED = {"exit_reason": "finished", "flags": ["entropy-collapsed"]}


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"summary": FLAGGED}, "Training of a2c: entropy-collapsed in most of its runs."),
        ({"grad_clipped": 1.0}, "clipped in most updates of a2c (100%)"),
        ({"completions/clipped_ratio": 0.6}, "most completions of a2c (60%) were cut off"),
        ({}, "report"),
    ],
)
@pytest.mark.parametrize(
    ("end", "verdict"), [(-0.1, "worse"), (0.5, "equivalent"), (0.9, "better")]
)
def test_what_happens_in_training_is_said_beside_the_verdict_and_excludes_no_arm(
    tmp_path, capsys, said, trained, words, end, verdict
):
    arms = {"reinforce": rising(0.5), "a2c": rising(end, 0.003, **trained), "rloo": rising(0.6)}
    compared(tmp_path, arms, margin=0.02)
    capsys.readouterr()
    options = WALK | {"quiet": False, "margin": 0.02}
    comparison = tokenrl.compare(**options, arms=tuple(arms), output_dir=tmp_path)
    assert comparison.judgement.verdicts() == {
        ("walk", "a2c"): verdict,
        ("walk", "rloo"): "better",
    }
    printed = said()
    assert words in printed and ("Training of" in printed) == ("summary" in trained)


def test_a_run_without_a_score_failed_and_an_arm_that_has_none_is_worse(tmp_path):
    ended = {"summary": {"exit_reason": "failed", "error": "No memory."}}

    def unmeasured(seed):
        lost = {1: ended, 4: {"rewards": [math.nan] * 6}}  # the first has a score
        return rising(0.9)(seed) | lost.get(seed, {})

    arms = {"reinforce": rising(0.5), "a2c": unmeasured, "rloo": rewards(math.nan, **ended)}
    comparison = compared(tmp_path, arms, seeds=8)
    assert list(comparison.judgement.verdicts().values()) == ["better", "worse"]
    a2c, rloo = comparison.judgement.families[0].differences
    assert {1, 4}.isdisjoint(a2c.differences) and not rloo.differences
    headline = comparison.words.headline
    assert "Runs failed: a2c in 2 of 8 runs and rloo in 8 of 8 runs" in headline
    assert comparison.exit_code == 1
    assert row(comparison, "a2c", 4)["reason"] == "It has no area."
    sentences = comparison.family.sentences()
    assert "2 of 8 runs of a2c failed" in sentences[0]
    assert "rloo is worse than reinforce, because it fails more often." in sentences[1]


def test_at_a_ceiling_the_headline_says_so(tmp_path):
    def solved(size):
        return lambda seed: {"rewards": [20, *(499 + noise(seed, size) for _ in range(5))]}

    arms = {"reinforce": solved(0.01), "a2c": solved(0.02)}
    comparison = compared(tmp_path, arms, env="CartPole-v1", margin=5.0)
    (text,) = caveats_of(comparison, "Ceiling")
    assert "From 475 on" in text and "Compare at a smaller budget" in text
    assert "every arm ends at the ceiling" in comparison.words.headline


def test_controls_are_named_and_say_nothing_of_the_ceiling(tmp_path):
    """Rewards at random end at 0, which would hide that both arms end at the ceiling."""

    def at(end, size):
        counts = {"counts": lambda step: {"num_samples": 128 * step}, "config": {"kind": "train"}}
        return lambda seed: {"rewards": [0, *(end + noise(seed, size) for _ in range(5))], **counts}

    arms = {"rloo": at(0.99, 0.001), "grpo": at(0.99, 0.002), "random": at(0.2, 0.003)}
    options = {"task": "sort_digits", "arms": tuple(arms), "max_steps": 50, "eval_every": 10}
    plan = planned({**options, "output_dir": str(tmp_path)})
    write_missing(plan.runs({}), tmp_path, lambda run: arms[run.arm](run.seed))
    comparison = judge_directory(tmp_path)
    assert caveats_of(comparison, "Control: random (a control: the rewards of each step")
    assert caveats_of(comparison, "Ceiling")
    headline = comparison.words.headline
    assert "Worse than rloo: random." in headline and "random is a control" in headline
    levels = {difference.level for difference in comparison.family.differences}
    assert levels == {1 - 0.05 / 2}, "a verdict on a control is one of the family"
