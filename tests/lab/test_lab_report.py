"""The command `tokenrl lab exact`: what it prints, writes and returns."""

from __future__ import annotations

from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from folders import read_json

from tokenrl.cli import main
from tokenrl.core import off_policy
from tokenrl.core.choices import CHOICES
from tokenrl.files import plain
from tokenrl.lab import measure_bias, named_estimators
from tokenrl.lab.exact.enumeration import Moments
from tokenrl.lab.exact.report import records
from tokenrl.lab.exact.verdict import Verdict

SOME = ["--estimators", "rloo", "grpo", "scale batch_std", "maxrl", "spo"]


def written(folder: Path) -> tuple[int, str, str, Path]:
    """Exit code, output and errors of the command, and what it wrote."""
    path = folder / "lab.json"
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        code = main(["lab", "exact", "--json", str(path), *SOME])
    return code, out.getvalue(), err.getvalue(), path


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return written(tmp_path_factory.mktemp("lab"))


def test_a_table_records_and_progress(once):
    code, out, err, path = once
    assert code == 0 and "enumerating" in err and "100%" in err
    assert "every declaration holds" in out and "5 estimators" in out
    (row,) = [line.split() for line in out.splitlines() if line.split()[:1] == ["rloo"]]
    assert row[1:4] == ["exact", "exact", "1.000000"] and row[-1] == "yes"
    assert [p.name for p in path.parent.iterdir()] == ["lab.json"]
    found = read_json(path)
    assert {r["estimator"] for r in found} == {*SOME[1:]}
    columns = ["estimator", "declared", "found", "cosine", "relative_bias", "variance", "noise"]
    columns += ["ok", "on_binary", "of_reward", "off_policy", "problems"]
    for record in found:
        assert list(record) == sorted(columns) and record["ok"] is True
        assert record["cosine"] == min(p["cosine"] for p in record["problems"])
        assert record["noise"] == record["problems"][0]["noise"] > 0
    by_name = {r["estimator"]: r for r in found}
    assert by_name["rloo"]["relative_bias"] < 1e-10 < by_name["grpo"]["relative_bias"]
    assert by_name["scale batch_std"]["found"] == "asymptotic"
    assert by_name["rloo"]["off_policy"] == "biased"


@pytest.mark.parametrize(
    ("table", "name", "status", "estimator"),
    [
        (off_policy.CORRECTIONS, "token", off_policy.EXACT_FOR_POLICY, "importance token"),
        (CHOICES["aggregation"], "sequence_mean", "exact", "aggregation sequence_mean"),
    ],
)
def test_a_wrong_declaration_ends_with_exit_code_1(
    table, name, status, estimator, capsys, monkeypatch, workplace
) -> None:
    monkeypatch.setitem(table, name, replace(table[name], status=status))
    command = ["lab", "exact", "--json", "lab.json", "--estimators", "importance sequence"]
    assert main([*command, estimator]) == 1
    out = capsys.readouterr().out
    assert f"declared wrongly: {estimator}." in out and "NO" in out.split()
    assert {r["estimator"]: r["ok"] for r in read_json("lab.json")}[estimator] is False


def test_what_was_tried_is_said_for_each_estimator(once):
    out = " ".join(once[1].split())
    all_of_them = "prompts 1 to 4, group size 2 to 8, tokens 1 to 6, rewards -5.4 to 14"
    assert f"Tried for rloo: {all_of_them}." in out
    small = "prompts 1 to 3, group size 2 to 4, tokens 1 to 3, rewards -2.6 to 2"
    assert f"grpo; scale batch_std: {small}." in out
    assert "Tried for maxrl: prompts 1 to 3, group size 2 to 6, tokens 1 to 3, rewards 0 to" in out
    assert f"Tried for spo: {small}, the memory held fixed." in out


def test_an_expected_gradient_of_zero_is_infinitely_noisy():
    numbers = Moments(torch.zeros(1, 2).double(), torch.ones(1, 2).double(), 2.0)
    verdicts = {
        "zero": Verdict("biased", "biased", (numbers,)),
        "rloo": measure_bias(named_estimators()["rloo"]),
    }
    (zero, _) = plain(records(verdicts))
    assert zero["noise"] == zero["problems"][0]["noise"] == "Infinity" and zero["ok"] is True
