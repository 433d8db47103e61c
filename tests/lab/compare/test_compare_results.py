"""What is read from run directories: evaluations, scores, training means, and how a run ended."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from grid_of_runs import control
from made_comparison import EPISODES, NONE, PROBLEM, RLOO, compared, record, six
from written_run import FINISHED, FIVE, Row, planned, read, rows_of, write_run

from tokenrl.errors import Refused, Stopped
from tokenrl.lab.compare.execution.one import run_one
from tokenrl.lab.compare.records import Problem, RunRecord
from tokenrl.lab.compare.results import due_places, is_done, read_record
from tokenrl.runs.metrics import write_completions

ENV_STEPS = replace(
    EPISODES,
    unit="environment steps",
    budget=800,
    settings={"env": "walk", "max_steps": 10, "num_steps": 10, "eval_every": 2},
)


def test_scores_are_those_of_the_evaluations_without_that_before_training(tmp_path: Path) -> None:
    found = read(tmp_path, rows_of(FIVE))
    assert found.state == "finished" and found.reason == ""
    assert found.samples == (0, 80, 160, 240, 320, 400)
    assert found.curves["reward"] == (0.1, 0.2, 0.3, 0.5, 0.7, 0.8)
    assert found.seconds == (0, 5, 10, 15, 20, 25)
    assert found.scores["area"] == pytest.approx((0.2 + 0.3 + 0.5 + 0.7 + 0.8) / 5)
    assert found.scores["reward"] == 0.8
    assert found.scores["area_greedy"] == pytest.approx((0.8 + 0.7 + 0.5 + 0.3 + 0.2) / 5)
    assert found.scores["reward_greedy"] == pytest.approx(0.2)
    assert "entropy" not in found.scores and "kl" not in found.scores


def test_an_arm_with_more_samples_per_step_is_read_at_the_same_places(tmp_path: Path) -> None:
    """Ten samples per step and not eight: its evaluations come at 90, 170, 250, 330 and 410 samples."""
    rewards = dict(zip((9, 17, 25, 33, 41), (0.2, 0.3, 0.5, 0.7, 0.8), strict=True))
    found = read(tmp_path, rows_of(rewards, last=41, per_step=10))
    assert found.samples == (0, 90, 170, 250, 330, 410)
    at_80 = 0.1 + (0.2 - 0.1) * 80 / 90
    at_160 = 0.2 + (0.3 - 0.2) * 70 / 80
    at_240 = 0.3 + (0.5 - 0.3) * 70 / 80
    at_320 = 0.5 + (0.7 - 0.5) * 70 / 80
    at_400 = 0.7 + (0.8 - 0.7) * 70 / 80
    assert found.scores["area"] == pytest.approx((at_80 + at_160 + at_240 + at_320 + at_400) / 5)
    assert found.scores["reward"] == 0.8, "at the end, wherever that is"


@pytest.mark.parametrize(
    ("summary", "state", "reason"),
    [
        (
            {"exit_reason": "failed", "error": "The loss is nan.", "eval_after": None},
            "failed",
            "The loss is nan.",
        ),
        ({"exit_reason": "SIGTERM"}, "failed", "It was stopped by SIGTERM before its end."),
        (None, "failed", "It was ended from outside."),
        ({"exit_reason": "learnt"}, "finished", ""),
        ({"exit_reason": "stuck"}, "finished", ""),
        ({"exit_reason": "solved"}, "finished", ""),
        ({"exit_reason": "check"}, "failed", "It was stopped by check before its end."),
    ],
)
def test_a_run_that_ends_early_keeps_its_last_evaluation(
    tmp_path: Path, summary: Row | None, state: str, reason: str
) -> None:
    found = read(tmp_path, rows_of(FIVE, last=23), summary)
    assert (found.state, found.reason) == (state, reason)
    assert found.samples == (0, 80, 160, 240, 320, 400)
    assert found.curves["reward"] == (0.1, 0.2, 0.3, 0.3, 0.3, 0.3)
    assert found.seconds == (0, 5, 10, 10, 10, 10)
    assert found.scores["area"] == pytest.approx((0.2 + 4 * 0.3) / 5) and found.scores["reward"] == 0.3


def test_the_evaluation_after_an_early_end_stands_in_the_summary_alone(tmp_path: Path) -> None:
    summary = {"exit_reason": "learnt", "eval_after": {"reward": 0.4, "reward_greedy": 0.9}}
    found = read(tmp_path, rows_of(FIVE, last=23), summary)
    assert found.samples == (0, 80, 160, 184, 240, 320, 400)
    assert found.curves["reward"] == (0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4)
    assert found.scores["area"] == pytest.approx((0.2 + 0.3 + 3 * 0.4) / 5)
    assert found.seconds == (0, 5, 10, 11.5, 11.5, 11.5, 11.5)


def test_an_evaluation_that_both_files_have_counts_once(tmp_path: Path) -> None:
    found = read(tmp_path, rows_of(FIVE), {**FINISHED, "eval_after": {"reward": 0.8, "reward_greedy": 0.2}})
    assert len(found.samples) == 6


def test_a_missing_run_is_told_and_has_no_score(tmp_path: Path) -> None:
    found = read_record(planned(), tmp_path, PROBLEM)
    assert found.state == "missing" and found.reason and found.scores == {} and found.samples == ()
    assert not is_done(planned(), tmp_path)


def test_a_run_without_any_step_is_carried_forward_from_before_training(tmp_path: Path) -> None:
    found = read(tmp_path, rows_of({}, last=0), {"exit_reason": "failed", "error": "No memory."})
    assert found.curves["reward"] == (0.1,) * 6 and found.scores["area"] == pytest.approx(0.1)
    assert found.training == {} and found.reason == "No memory."


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.5, where the comparison plans 0.001"),
        ({"seed": 4}, "seed 4, where the comparison plans 3"),
        ({"eval_every": 5}, "eval_every 5, where the comparison plans 10"),
        ({"max_samples": 10}, "max_samples 10, where the comparison plans 400"),
        (
            {"estimator": {"scale": "group_std"}},
            "estimator.scale 'group_std', where the comparison plans 'none'",
        ),
        ({"estimator": {"epsilon_high": 0.3}}, "estimator.epsilon_high 0.3, where the comparison plans None"),
    ],
)
def test_a_directory_with_other_settings_is_refused_by_the_name_of_the_setting(
    tmp_path: Path, config: Row, named: str
) -> None:
    write_run(tmp_path, rows_of(FIVE), config={"max_samples": 400, **config})
    run = planned(max_samples=400)
    for read_it in (lambda: is_done(run, tmp_path), lambda: read_record(run, tmp_path, PROBLEM)):
        with pytest.raises(Refused, match="holds another run") as refused:
            read_it()
        assert named in str(refused.value) and str(refused.value).count("where the comparison") == 1


def test_settings_that_decide_nothing_may_differ(tmp_path: Path) -> None:
    config = {"quiet": True, "threads": 7, "temperature": 1.0, "estimator": {"baseline": "rloo"}}
    write_run(tmp_path, rows_of(FIVE), config=config)
    assert is_done(planned(quiet=False, threads=1, temperature=None), tmp_path)


def test_samples_are_completions_also_those_that_no_step_row_adds_up(tmp_path: Path) -> None:
    found = read(tmp_path, rows_of(FIVE, per_step=12))
    assert found.samples == (0, 120, 240, 360, 480, 600)
    assert found.scores["area"] == pytest.approx(
        sum((0.1 + 0.1 * 80 / 120, 0.2 + 0.1 / 3, 0.3, 0.3 + 0.2 * 2 / 3, 0.5 + 0.2 / 3)) / 5
    )


def test_samples_are_episodes_added_up_or_steps_of_the_environment(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"step": step, "episodes": 2 + step % 2, "num_env_steps": 100 * step} for step in range(1, 11)
    ]
    rows = [{"step": 0}, *rows]
    for row in rows[::2]:
        row["eval_reward"] = row["step"] / 10
    run = write_run(tmp_path, rows)
    assert read_record(run, tmp_path, replace(EPISODES, budget=25)).samples == (0, 5, 10, 15, 20, 25)
    steps = read_record(run, tmp_path, ENV_STEPS)
    assert steps.samples == (0, 200, 400, 600, 800, 1000)
    assert due_places(ENV_STEPS) == [160, 320, 480, 640, 800]
    assert steps.scores["area"] == pytest.approx((0.16 + 0.32 + 0.48 + 0.64 + 0.8) / 5)


def test_places_end_with_the_budget() -> None:
    assert due_places(PROBLEM) == [80, 160, 240, 320, 400]
    assert due_places(replace(PROBLEM, budget=410)) == [80, 160, 240, 320, 400, 410]
    assert due_places(replace(PROBLEM, settings={"eval_every": 0})) == [400]
    assert due_places(replace(PROBLEM, settings={"eval_every": 100})) == [400]


def test_an_evaluation_that_is_nan_is_bridged(tmp_path: Path) -> None:
    found = read(tmp_path, rows_of({**FIVE, 20: math.nan, 50: math.nan}))
    assert [math.isnan(x) for x in found.curves["reward"]] == [False, False, True, False, False, True]
    assert found.scores["area"] == pytest.approx((0.2 + 0.35 + 0.5 + 0.7 + 0.7) / 5)
    assert found.scores["reward"] == 0.7, "the last finite one"


def test_a_run_whose_every_reward_is_nan_has_no_score_and_stops_the_judgement(tmp_path: Path) -> None:
    rows = [{**row, "eval_reward": math.nan} for row in rows_of(FIVE) if "eval_reward" in row]
    found = read(tmp_path, rows)
    assert "reward" not in found.curves and set(found.scores) == {"area_greedy", "reward_greedy"}
    nothing = [replace(found, run=one.run) for one in six(NONE)]
    with pytest.raises(Stopped, match=r"no arm has the score area .* the reference rloo .*--metric"):
        compared([*six(RLOO), *nothing])
    with pytest.raises(Stopped, match="the reference none has it"):
        compared([*six(RLOO), *nothing], arms=(NONE, RLOO))
    lost = [RunRecord(one.run, "missing", "No memory.") for one in six(NONE)]
    with pytest.raises(Stopped, match=r"none, seed 0: No memory\. Mend that"):
        compared([*six(RLOO), *lost])
    one_of_six = compared(
        [*six(RLOO), *six(NONE)[:5], replace(nothing[5], state="failed", reason="It was nan.")]
    )
    assert one_of_six.judgement.verdicts() == {("digits", "none"): "void"}
    assert one_of_six.to_threshold["digits"][1].samples[5] is None


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path, rows_of(FIVE, last=30), summary=None)
    path = tmp_path / run.path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    found = read_record(run, tmp_path, PROBLEM)
    assert found.curves["reward"] == (0.1, 0.2, 0.3, 0.3, 0.3, 0.3) and found.state == "failed"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:5], b'{"st', *lines[6:]]))
    with pytest.raises(Refused, match="Line 6"):
        read_record(run, tmp_path, PROBLEM)


def test_means_over_training_steps(tmp_path: Path) -> None:
    rows = rows_of(FIVE, frac_reward_zero_std=0.0, grad_clipped=0.0)
    for row in rows[1:]:
        step = row["step"]
        row |= {"entropy": 1.0 / step, "kl": float(step), "completions/clipped_ratio": 0.02 * (step > 25)}
        row |= {"skipped_steps": step // 10, "idle_steps": step // 2}
    for row in rows[1:6]:
        row["frac_reward_zero_std"] = 0.6
    rows[7]["grad_clipped"] = 1.0
    rows[0]["entropy"] = 99.0
    found = read(tmp_path, rows, num_iterations=2, num_minibatches=5).training
    assert found["entropy_start"] == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)
    assert found["entropy"] == pytest.approx((1 / 46 + 1 / 47 + 1 / 48 + 1 / 49 + 1 / 50) / 5)
    assert found["kl"] == pytest.approx(48)
    assert found["frac_reward_zero_std_start"] == pytest.approx(0.6)
    assert found["clipped_ratio"] == pytest.approx(0.01)
    assert found["grad_clipped"] == pytest.approx(1 / 50)
    assert found["skipped"] == pytest.approx(5 / 500) and found["idle"] == pytest.approx(25 / 500)


def test_entropy_and_kl_are_scores_and_a_density_has_no_least_entropy(tmp_path: Path) -> None:
    found = read(tmp_path, rows_of(FIVE, entropy=-0.5, kl=0.3), head="gaussian")
    assert found.scores["entropy"] == -0.5 and found.scores["kl"] == pytest.approx(0.3)
    assert "entropy_start" not in found.training


def test_completions_of_the_last_table_are_kept_from_all_over_the_step(tmp_path: Path) -> None:
    run = write_run(tmp_path, rows_of(FIVE))
    folder = tmp_path / run.path / "completions"
    write_completions(folder, 10, [{"prompt": "old", "completion": "old", "reward": 0.0}])
    rows = [{"prompt": f"p{i}", "completion": "c", "reward": float(i), "extra": 1} for i in range(16)]
    write_completions(folder, 20, rows)
    kept = read_record(run, tmp_path, PROBLEM).completions
    assert [row["prompt"] for row in kept] == [f"p{i}" for i in range(0, 16, 2)]
    assert set(kept[0]) == {"prompt", "completion", "reward"}


def test_a_real_run_is_read_as_its_files_say(tmp_path: Path) -> None:
    run = control(max_steps=3, eval_every=2)
    assert not is_done(run, tmp_path)
    assert run_one(run, tmp_path).state == "finished" and is_done(run, tmp_path)
    settings = {"env": "bandit", "max_steps": 3, "eval_every": 2}
    problem = Problem("bandit", "control", settings, 12, "episodes", 1, 4, 0.02)
    found = read_record(run, tmp_path, problem)
    lines = (tmp_path / run.path / "metrics.jsonl").read_text().splitlines()
    rewards = [row["eval_reward"] for row in map(json.loads, lines) if "eval_reward" in row]
    assert found.samples == (0, 8, 12) and found.curves["reward"] == tuple(rewards)
    assert found.scores["area"] == pytest.approx(sum(rewards[1:]) / 2)
    assert 0 < found.seconds[1] < found.seconds[2] and set(found.training) >= {"entropy", "grad_clipped"}
    with pytest.raises(Refused, match="max_steps 3, where the comparison plans 4"):
        is_done(replace(run, settings={**run.settings, "max_steps": 4}), tmp_path)


def test_the_helper_of_the_other_tests_computes_scores_as_runs_do(tmp_path: Path) -> None:
    made = record(RLOO, 3, (0.1, 0.2, 0.3, 0.5, 0.7, 0.8), (0.0, 0.8, 0.7, 0.5, 0.3, 0.2))
    found = read(tmp_path, rows_of(FIVE))
    assert {name: made.scores[name] for name in found.scores} == pytest.approx(found.scores)
    assert made.samples == found.samples
