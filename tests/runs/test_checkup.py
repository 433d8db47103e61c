"""What a check found: how it is told, and with which exit code."""

from __future__ import annotations

import pytest

from tokenrl.runs.checkup import Finding, conclude, rate_finding, time_needed
from tokenrl.runs.session import Session

GRAVE = Finding("a-problem", "One is missing.", "It is needed.", "Add one.")
REMARK = Finding("a-remark", "Two are alike.", "One is enough.", "Leave one out.", grave=False)


@pytest.mark.parametrize(
    ("findings", "code", "flags"),
    [
        ([], 0, []),
        ([REMARK], 0, ["a-remark"]),
        ([REMARK, GRAVE, GRAVE], 2, ["a-problem", "a-problem", "a-remark"]),
    ],
)
@pytest.mark.parametrize("quiet", [False, True])
def test_problems_are_numbered_on_the_standard_error_and_the_rest_on_the_output(
    findings, code, flags, quiet, tmp_path, capsys
):
    with Session("train", tmp_path / "run", quiet=quiet) as session:
        assert conclude(session, "all parts", {"size": "3 [bold]apples"}, findings) == code
        assert session.flags == flags
    captured = capsys.readouterr()
    text = "One is missing. It is needed. Add one."
    lines = ["tokenrl: Check not passed: 2 problems. Nothing was trained."]
    lines += [f"  {i}. a-problem: {text}" for i in (1, 2)]
    assert captured.err.splitlines() == (lines if code else [])
    assert ("3 [bold]apples" in captured.out) != quiet
    assert ("warning: a-remark: Two are alike." in captured.out) == (bool(findings) and not quiet)
    assert ("Check passed: all parts work together." in captured.out) == (code == 0 and not quiet)
    assert not (tmp_path / "run").exists()


def test_other_processes_than_the_main_one_return_the_code_and_print_nothing(tmp_path, capsys):
    with Session("train", tmp_path / "run", main=False) as session:
        assert conclude(session, "all parts", {}, [GRAVE, REMARK]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("times", "grave"), [(1, None), (10, None), (1 / 30, None), (11, False), (31, True), (1 / 31, False)]
)
def test_a_rate_is_usual_within_a_range(times, grave):
    found = rate_finding(1e-3 * times, 1e-3, "this model")
    assert (found if found is None else found.grave) is grave
    if found is not None:
        assert found.mend == "Set --learning-rate 0.001."
        assert ("hardly change" in found.why) == (times < 1)


def test_times_are_a_range_unless_both_ends_are_near():
    assert time_needed(60, 125) == "about 1:00 to 2:05"
    assert time_needed(60, 65) == "about 1:05" and time_needed(0.1, 0.4) == "about 0:00"
