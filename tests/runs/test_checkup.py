"""What a check found: how it is told, and with which exit code."""

from __future__ import annotations

import pytest

from tokenrl.runs.checkup import conclude
from tokenrl.runs.findings import Finding
from tokenrl.runs.session import Session

GRAVE = Finding("a-problem", "void", "One is missing: add one.")
REMARK = Finding("a-remark", "watch", "Two are alike.")


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
    lines = ["tokenrl: Check not passed: 2 problems. Nothing was trained."]
    lines += [f"  {i}. a-problem: One is missing: add one." for i in (1, 2)]
    assert captured.err.splitlines() == (lines if code else [])
    assert ("3 [bold]apples" in captured.out) != quiet
    assert ("warning: a-remark: Two are alike." in captured.out) == (bool(findings) and not quiet)
    assert ("Check passed: all parts work together." in captured.out) == (code == 0 and not quiet)
    assert not (tmp_path / "run").exists()


def test_other_processes_than_the_main_one_return_the_code_and_print_nothing(tmp_path, capsys):
    with Session("train", tmp_path / "run", main=False) as session:
        assert conclude(session, "all parts", {}, [GRAVE, REMARK]) == 2
    assert capsys.readouterr() == ("", "")
