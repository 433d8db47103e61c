"""What a comparison reads from its runs and says of them, with runs that are written by hand."""

import math

import made_runs
import numpy as np
import pytest
from made_runs import WALK, caveats_of, compared, noise, planned, rising, write_run
from refusals import stopped

import tokenrl
from tokenrl.lab.compare.loop import judge_directory, missing
from tokenrl.lab.compare.table import read_runs
from tokenrl.runs.files import write_json

REWARDS = (0.1, 0.2, 0.3, 0.5, 0.7, 0.8)


def rewards(*values, **options):
    return lambda seed: {"rewards": list(values), **options}


def row(comparison, arm, seed=0):
    runs = comparison.table.of(comparison.plan.problems[0].label).query("arm == @arm")
    return runs[runs["seed"] == seed].iloc[0]


def curve(comparison, arm, seed=0):
    curves = comparison.table.curves
    return list(curves["reward"][curves["path"] == row(comparison, arm, seed)["path"]])


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
        ({"exit_reason": "check"}, "failed", "It ended as check."),
        ({}, "failed", "It was ended from outside, as for want of memory."),
        (
            {"exit_reason": "SIGTERM"},
            "missing",
            "It was stopped by SIGTERM; the same command continues it.",
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
    assert "because it fails more often" in comparison.judgement.of("walk").sentences()[0]
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
    assert (
        "Worse than reinforce: a2c. But most updates were clipped"
        in comparison.words["CartPole-v1"].headline
    )


def test_tuned_rates_are_chosen_and_an_edge_is_reported(tmp_path):
    """The better the larger the rate, up to the end of the grid."""
    options = {"learning_rate": "tuned", "seeds": 2, "arms": ("reinforce", "a2c")}
    plan = planned({**WALK, **options, "output_dir": str(tmp_path)})
    rows = []
    while runs := missing(plan, rows):
        for run in runs:
            write_run(tmp_path / run.path, **rising(run.learning_rate)(run.seed))
        rows += read_runs(plan, runs, tmp_path)
    comparison = judge_directory(tmp_path)
    usual = plan.problems[0].settings["learning_rate"]
    assert row(comparison, "a2c")["learning_rate"] == 16 * usual
    assert (
        "is the least or the greatest that was tried" in caveats_of(comparison, "Learning rate")[0]
    )


def test_nothing_to_judge_is_told_with_the_reason(tmp_path):
    broken = {"exit_reason": "failed", "error": "No memory."}
    arms = {arm: rewards(summary=broken) for arm in ("reinforce", "a2c")}
    with stopped("Nothing can be judged on walk"):
        compared(tmp_path, arms, seeds=2)


@pytest.mark.parametrize(
    ("trained", "words"),
    [
        ({"entropy": 0.01}, "the entropy was 0.01 nats from the start on"),
        ({"skipped_steps": 40}, "80.0% of the updates were skipped"),
        ({"grad_clipped": 1.0}, "clipped in most updates of a2c (100%)"),
        ({}, ""),
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
    told = words in printed or (end > 0 and "entropy" in trained)  # sharp, and it has learnt
    assert told and "not valid" not in printed and "void" not in printed


def test_a_run_without_a_score_failed_and_an_arm_that_has_none_is_not_valid(tmp_path):
    ended = {"summary": {"exit_reason": "failed", "error": "No memory."}}

    def unmeasured(seed):
        lost = {1: ended, 4: {"rewards": [math.nan] * 6}}  # the first has a score
        return rising(0.9)(seed) | lost.get(seed, {})

    arms = {"reinforce": rising(0.5), "a2c": unmeasured, "rloo": rewards(math.nan, **ended)}
    comparison = compared(tmp_path, arms, seeds=8)
    assert list(comparison.judgement.verdicts().values()) == ["better", "void"]
    assert {1, 4}.isdisjoint(comparison.judgement.families[0].differences[0].differences)
    assert "Runs failed: a2c in 2 of 8 runs" in comparison.words["walk"].headline
    assert comparison.exit_code == 1
    assert row(comparison, "a2c", 4)["reason"] == "It has no area."
    assert "Not valid, so not compared with reinforce: rloo." in comparison.words["walk"].headline
    sentences = comparison.judgement.of("walk").sentences()
    assert "2 of 8 runs of a2c failed" in sentences[0]
    assert sentences[-1] == "rloo is not valid: no run of it has area. No memory."


def test_at_a_ceiling_the_headline_says_so(tmp_path):
    def solved(size):
        return lambda seed: {"rewards": [20, *(499 + noise(seed, size) for _ in range(5))]}

    arms = {"reinforce": solved(0.01), "a2c": solved(0.02)}
    comparison = compared(tmp_path, arms, env="CartPole-v1", margin=5.0)
    (text,) = caveats_of(comparison, "Ceiling")
    assert "475 counts as solved" in text and "Compare at a smaller budget" in text
    assert "every arm ends at the ceiling" in comparison.words["CartPole-v1"].headline


def test_no_further_comparison_is_proposed_from_the_results(tmp_path, capsys):
    """A margin or a number of seeds chosen from the results would not keep the level."""
    arms = {"reinforce": rising(0.5, 0.02), "a2c": rising(0.505, 0.05)}
    compared(tmp_path, arms, margin=0.001)
    capsys.readouterr()
    options = WALK | {"quiet": False, "margin": 0.001}
    comparison = tokenrl.compare(**options, arms=tuple(arms), output_dir=tmp_path)
    assert list(comparison.judgement.verdicts().values()) == ["undecided"]
    written = [(tmp_path / name).read_text() for name in ("report.html", "comparison.json")]
    for text in (*written, capsys.readouterr().out):
        assert "new seeds" not in text and "--margin" not in text.replace("--margin 0.001", "")


def test_cut_completions_and_equal_groups_of_an_arm_that_compares_them_are_told(
    tmp_path, monkeypatch
):
    options = {"task": "sort_digits", "prompts_per_step": 2, "num_generations": 4, "max_steps": 50}
    monkeypatch.setattr(made_runs, "WALK", {"eval_every": 10, "quiet": True})
    runs = {
        "reinforce": rising(0.5),
        "reinforce,aggregation=token_mean": rising(-0.1, frac_reward_zero_std=0.9),
        "rloo": rising(-0.1, frac_reward_zero_std=0.9),
        "grpo": rising(0.7, **{"completions/clipped_ratio": 0.6}),
    }
    counts = {"counts": lambda step: {"num_samples": 8 * step}}
    arms = {arm: lambda seed, of=of: of(seed) | counts for arm, of in runs.items()}
    comparison = compared(tmp_path, arms, **options)
    assert list(comparison.judgement.verdicts().values()) == ["worse", "worse", "better"]
    equal, cut = caveats_of(comparison, "Training of")
    assert "rloo: Nothing was gained: 90% of the first groups had equal rewards" in equal
    assert "grpo: 60% of the completions are cut off at" in cut
