"""An arm is void for a reason that its runs show, and never for one that they do not."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from made_comparison import EPISODES, NONE, RLOO, arm, compared, record, rising, six

from tokenrl.lab.compare.gates import gates, void_reason
from tokenrl.lab.compare.records import RunRecord


def broken(records: list[RunRecord]) -> dict[str, str]:
    return {name: reason for name, reason in gates(records) if reason}


def test_normal_runs_pass_every_gate() -> None:
    records = six(RLOO)
    assert broken(records) == {} and void_reason(records) == ""
    assert len(gates(records)) == 4


def test_a_run_that_failed_voids_its_arm_and_is_told_with_its_reason() -> None:
    records = six(NONE)
    records[3] = replace(records[3], state="failed", reason="The loss is not finite.")
    reason = broken(records).pop("all runs finished")
    assert reason.startswith("1 of 6 runs did not finish") and "Seed 3: The loss is not finite." in reason
    found = compared([*six(RLOO), *records])
    assert found.judgement.verdicts() == {("digits", "none"): "void"}
    family = found.judgement.families[0]
    assert {one.arm: one.void for one in family.arms} == {"rloo": "", "none": reason}
    assert 3 in family.differences[0].differences, "a failed run counts with the score of its end"
    assert found.exit_code == 1


def test_a_missing_run_voids_its_arm_too() -> None:
    records = six(RLOO)
    records[0] = RunRecord(records[0].run, "missing", "It has not been run.")
    assert "Seed 0: It has not been run." in broken(records)["all runs finished"]


def test_of_many_failures_three_are_told_and_the_seeds_of_the_rest() -> None:
    records = [record(RLOO, seed, failed=f"Reason {seed}.") for seed in range(5)]
    reason = void_reason(records)
    assert "Reason 2." in reason and "Reason 3." not in reason
    assert reason.endswith("And 2 more: seeds 3, 4.")
    assert void_reason(records[:4]).endswith("And 1 more: seeds 3.")
    assert "more" not in void_reason(records[:3])


@pytest.mark.parametrize(
    ("gate", "name", "passes", "fails"),
    [
        ("completions end", "clipped_ratio", 0.5, 0.51),
        ("signal at the start", "frac_reward_zero_std_start", 0.5, 0.51),
        ("entropy at the start", "entropy_start", 0.1, 0.099),
    ],
)
def test_a_gate_closes_behind_its_limit_and_means_over_runs(
    gate: str, name: str, passes: Any, fails: Any
) -> None:
    flat = (0.3,) * 6
    assert broken([record(RLOO, s, flat, **{name: passes}) for s in range(2)]) == {}
    assert list(broken([record(RLOO, s, flat, **{name: fails}) for s in range(2)])) == [gate]
    apart = [record(RLOO, s, flat, **{name: passes + sign * 0.05}) for s, sign in ((0, 1), (1, -1))]
    assert broken(apart) == {}, "the mean counts, not the worst run"
    untold = [replace(r, training={}) for r in apart]
    assert broken(untold) == {}, "what was not measured voids nothing"


def test_the_reasons_have_the_numbers_and_say_what_to_do() -> None:
    flat = [
        record(RLOO, 0, (0.3,) * 6, clipped_ratio=0.7, frac_reward_zero_std_start=0.8, entropy_start=0.05)
    ]
    reason = void_reason(flat)
    assert "70% of the completions" in reason and "--max-completion-length" in reason
    assert "In 80% of the groups" in reason and "larger groups" in reason
    assert "0.05 nats" in reason and "(+0)" in reason and "--estimator.entropy-coef" in reason


@pytest.mark.parametrize(
    ("of", "void"),
    [
        (RLOO, True),
        (arm("grpo", baseline="group_mean", scale="group_std"), True),
        (NONE, False),
        (arm("running", baseline="running_mean"), False),
        (arm("drop", baseline="running_mean", zero_spread="drop"), True),
    ],
    ids=lambda of: getattr(of, "label", ""),
)
def test_equal_rewards_in_groups_matter_to_arms_that_compare_in_groups(of, void) -> None:
    assert ("signal at the start" in broken([record(of, frac_reward_zero_std_start=0.9)])) == void


def test_low_entropy_voids_only_an_arm_that_learnt_nothing_without_a_bonus() -> None:
    low: dict[str, Any] = {"entropy_start": 0.01}
    assert "entropy at the start" in broken([record(RLOO, 0, (0.3, 0.4, 0.4, 0.4, 0.4, 0.3), **low)])
    assert broken([record(RLOO, 0, (0.3, 0.3, 0.3, 0.3, 0.3, 0.31), **low)]) == {}, "it learnt"
    bonus = arm("bonus", entropy_coef=0.01)
    assert broken([record(bonus, 0, (0.3,) * 6, **low)]) == {}
    one_of_two = [record(RLOO, 0, rising(0.5), **low), record(RLOO, 1, (0.3,) * 6, **low)]
    assert broken(one_of_two) == {}


def test_an_evaluation_that_is_nan_closes_no_gate() -> None:
    low = record(RLOO, 0, (0.3, 0.4, 0.5, 0.6, 0.7, math.nan), entropy_start=0.01)
    assert broken([low]) == {}, "the last finite reward is above the first"
    none = record(RLOO, 0, (math.nan,) * 6, entropy_start=0.01)
    assert broken([none]) == {}, "nobody knows whether it learnt"
    fell = record(RLOO, 0, (0.3, 0.4, 0.5, 0.6, 0.2, math.nan), entropy_start=0.01)
    assert list(broken([fell])) == ["entropy at the start"]


def test_an_arm_of_episodes_passes() -> None:
    assert broken(six(RLOO, problem=EPISODES)) == {}


def test_a_void_reference_leaves_no_verdict_and_a_void_arm_only_its_own() -> None:
    third = arm("mean", baseline="batch_mean")
    cut = six(NONE, 0.9, clipped_ratio=0.9)
    found = compared([*six(RLOO), *cut, *six(third, 0.9, 0.003)], arms=(RLOO, NONE, third))
    assert found.judgement.verdicts() == {("digits", "none"): "void", ("digits", "mean"): "better"}
    found = compared([*six(RLOO), *cut, *six(third, 0.9, 0.003)], arms=(NONE, RLOO, third))
    assert set(found.judgement.verdicts().values()) == {"void"}
