"""The tables hold the numbers that were found, with all digits, and times apart from all else."""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_comparison import NONE, PLACES, RLOO, arm, compared, noise, record, rising, six

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.noise import GradientNoise
from tokenrl.lab.compare.records import Arm, RunRecord
from tokenrl.lab.compare.statistics.found import Interval
from tokenrl.lab.compare.statistics.overall import Overall
from tokenrl.lab.compare.tables import write_tables

THIRD = arm("mean", baseline="batch_mean")
TABLES = ("runs.csv", "comparisons.csv", "comparison.json")


def third(seed: int) -> float:
    """A number that needs all its digits."""
    return 0.8 + noise(seed, 1 / 300)


def runs(*, seconds: float = 2.0, other: Arm = NONE) -> list[RunRecord]:
    """Three arms on six seeds, one of them failed, and the reference once more on other seeds."""
    records = [record(RLOO, seed, rising(third(seed)), seconds=seconds) for seed in range(6)]
    records += six(other, 2 / 3, 1 / 700, seconds=2 * seconds)
    records += six(THIRD, 0.7, 1 / 900, seconds=seconds)
    records += [
        record(RLOO, 10_000 + s, rising(third(5 - s)), role="itself", seconds=seconds) for s in range(6)
    ]
    records[13] = replace(records[13], state="failed", reason="No memory.")
    return records


def written(folder: Path, *, seconds: float = 2.0, other: Arm = NONE) -> Comparison:
    folder.mkdir(parents=True, exist_ok=True)
    key = ("digits", "rloo")
    found = compared(
        runs(seconds=seconds, other=other),
        arms=(RLOO, other, THIRD),
        output_dir=folder,
        rates={key: 1 / 3000},
        sensitivity={key: {1 / 3000: (1 / 3, 0.5), 1e-3: (0.1,)}},
        changes=("the margin was changed",),
    )
    nan = Interval(math.nan, math.nan, math.nan)
    measured = Interval(1 / 7, 0.1, math.inf)
    found = replace(
        found,
        noise=(GradientNoise("digits", "start", "rloo", measured, nan, "No gradient."),),
        overall=Overall(
            {"rloo": Interval(1 / 9, 0.1, 0.2)}, {"rloo": ((0.0, 1.0), (0.5, 1 / 3))}, 0.95, "BCa"
        ),
        wall_seconds=100 * seconds,
    )
    write_tables(found)
    return found


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def strict(path: Path) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def number(cell: str) -> float | None:
    return float(cell) if cell else None


def test_runs_csv_holds_what_every_run_scored(tmp_path: Path) -> None:
    found = written(tmp_path)
    table = rows(tmp_path / "runs.csv")
    assert len(table) == len(found.records) == 24
    for row, one in zip(table, found.records, strict=True):
        assert (row["problem"], row["arm"], row["role"]) == ("digits", one.run.arm, one.run.role)
        assert (int(row["seed"]), row["path"]) == (one.run.seed, one.run.path)
        assert (row["state"], row["reason"]) == (one.state, one.reason)
        assert float(row["learning_rate"]) == 1e-3 and float(row["samples"]) == PLACES[-1]
        assert {name: number(row[name]) for name in one.scores} == one.scores
    assert "kl" not in table[0], "what no run measured has no column"
    assert table[13]["reason"] == "No memory." and table[18]["role"] == "itself"


def test_what_is_missing_is_an_empty_cell(tmp_path: Path) -> None:
    records = [*six(RLOO), *six(NONE)]
    records[7] = RunRecord(records[7].run, "missing", "It has not been run.")
    scores = {**records[8].scores, "reward_greedy": math.nan}
    found = compared(records, output_dir=tmp_path)
    write_tables(replace(found, records=(*records[:8], replace(records[8], scores=scores), *records[9:])))
    table = rows(tmp_path / "runs.csv")
    assert table[7]["state"] == "missing" and table[7]["samples"] == table[7]["area"] == ""
    assert table[8]["reward_greedy"] == "" and float(table[8]["area"]) == scores["area"]


def test_comparisons_csv_holds_every_difference(tmp_path: Path) -> None:
    found = written(tmp_path)
    table = rows(tmp_path / "comparisons.csv")
    judgements = [found.judgement, *found.beside.values()]
    metrics = [judgement.metric for judgement in judgements]
    assert metrics[0] == "area" and {"reward", "area_greedy", "reward_greedy", "entropy"} == set(metrics[1:])
    expected = []
    for judgement in judgements:
        family = judgement.families[0]
        assert family.itself is not None
        expected += [(judgement.metric, family, one) for one in (*family.differences, family.itself)]
    assert len(table) == len(expected) == 15
    for row, (metric, family, one) in zip(table, expected, strict=True):
        decides = metric == "area" and one is not family.itself
        assert (row["metric"], row["decides"]) == (metric, "yes" if decides else "no")
        assert (row["problem"], row["arm"], row["reference"]) == ("digits", one.arm, "rloo")
        assert (row["verdict"], int(row["pairs"])) == (one.verdict, 6)
        assert number(row["margin"]) == family.margin and number(row["seeds_needed"]) == one.seeds_needed
        found_in_row = [float(row[f"difference{end}"]) for end in ("", "_low", "_high")]
        assert found_in_row == list(one.mean)
        assert [float(row["low_at_level"]), float(row["high_at_level"])] == [
            one.adjusted.low,
            one.adjusted.high,
        ]
        assert [float(row[f"improvement{end}"]) for end in ("", "_low", "_high")] == list(one.improvement)
        for name in ("level", "sd", "p_sign_flip", "p_least", "p_holm"):
            assert float(row[name]) == getattr(one, name)
    assert [row["arm"] for row in table[:3]] == ["none", "mean", "rloo itself"]
    assert table[1]["verdict"] == "void"


def test_comparison_json_holds_all_numbers(tmp_path: Path) -> None:
    found = written(tmp_path)
    stored = strict(tmp_path / "comparison.json")
    assert stored["plan"]["margins"] == {"digits": 0.02} and stored["plan"]["changes"] == list(
        found.plan.changes
    )
    assert [arm["label"] for arm in stored["plan"]["arms"]] == ["rloo", "none", "mean"]
    assert stored["command"] == found.plan.command and stored["versions"] == found.versions
    for run, one in zip(stored["runs"], found.records, strict=True):
        assert run["scores"] == one.scores and run["training"] == one.training
        assert run["samples"] == list(one.samples) and run["curves"]["reward"] == list(one.curves["reward"])
        assert run["run"]["path"] == one.run.path and (run["state"], run["reason"]) == (one.state, one.reason)
    (family,), (ours,) = stored["judgement"]["families"], found.judgement.families
    for row, difference in zip(family["differences"], ours.differences, strict=True):
        assert row["mean"] == difference.mean._asdict() and row["adjusted"] == difference.adjusted._asdict()
        assert row["differences"] == {str(seed): x for seed, x in difference.differences.items()}
        assert (row["verdict"], row["p_holm"]) == (difference.verdict, difference.p_holm)
    assert family["arms"][2]["void"] == ours.arms[2].void != ""
    assert ours.itself is not None
    assert family["itself"]["mean"] == ours.itself.mean._asdict()
    assert set(stored["beside"]) == set(found.beside)
    assert stored["findings"] == {"digits": list(found.findings["digits"])}
    rates = {(row["problem"], row["arm"]): row["rate"] for row in stored["learning_rates"]}
    assert rates == found.rates and rates["digits", "rloo"] == 1 / 3000
    assert [(row["rate"], row["scores"]) for row in stored["sensitivity"]] == [
        (1 / 3000, [1 / 3, 0.5]),
        (1e-3, [0.1]),
    ]
    reached = stored["to_threshold"]["digits"][0]
    assert reached["arm"] == "rloo" and reached["samples"]["0"] == found.to_threshold["digits"][0].samples[0]
    assert stored["overall"]["arms"]["rloo"]["value"] == 1 / 9
    assert "version = {" + found.versions["tokenrl"] + "}" in stored["citation"]


def test_json_has_null_where_there_is_no_number_and_names_an_infinity(tmp_path: Path) -> None:
    written(tmp_path)
    (noise_of,) = strict(tmp_path / "comparison.json")["noise"]
    assert noise_of["cosine"] == {"value": None, "low": None, "high": None}
    assert noise_of["noise"] == {"value": 1 / 7, "low": 0.1, "high": "Infinity"}
    assert noise_of["note"] == "No gradient."


def test_one_pair_has_no_interval_and_is_written_all_the_same(tmp_path: Path) -> None:
    write_tables(compared([record(RLOO), record(NONE)], output_dir=tmp_path))
    row = rows(tmp_path / "comparisons.csv")[0]
    assert row["difference_low"] == row["sd"] == row["seeds_needed"] == "" and row["verdict"] == "descriptive"
    (family,) = strict(tmp_path / "comparison.json")["judgement"]["families"]
    assert family["differences"][0]["mean"] == {"value": 0.0, "low": None, "high": None}


def test_times_stand_under_timings_and_nowhere_else(tmp_path: Path) -> None:
    fast, slow = written(tmp_path / "fast", seconds=2.0), written(tmp_path / "slow", seconds=3.7)
    assert fast.records != slow.records
    for name in TABLES[:2]:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes()
    one, other = (strict(tmp_path / name / "comparison.json") for name in ("fast", "slow"))
    times, others = one.pop("timings"), other.pop("timings")
    assert json.dumps(one) == json.dumps(other)
    assert times["wall_seconds"] == 200.0 and others["wall_seconds"] == pytest.approx(370)
    assert times["runs"]["runs/digits/rloo-comparison/seed_0"] == [0, 2, 4, 6, 8, 10]
    reached = times["to_threshold"]["digits"]["none"]
    ours = fast.to_threshold["digits"][1]
    assert (
        reached["seconds"]["0"] == ours.seconds[0] != others["to_threshold"]["digits"]["none"]["seconds"]["0"]
    )
    assert reached["restricted_seconds"] == ours.restricted_seconds._asdict()
    assert reached["seconds_limit"] == ours.seconds_limit
    assert not re.search("seconds", json.dumps(one)), "no field of a time is left outside"


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    written(tmp_path / "one")
    written(tmp_path / "two")
    for name in TABLES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    "label", ["grpo,scale=none", 'mine.py:"best"', "two\nlines", "a\r\nb", "größe;=1+1", " x "]
)
def test_a_label_survives_the_tables(tmp_path: Path, label: str) -> None:
    written(tmp_path, other=arm(label, baseline="none"))
    assert {row["arm"] for row in rows(tmp_path / "runs.csv")} == {"rloo", label, "mean"}
    assert rows(tmp_path / "comparisons.csv")[0]["arm"] == label
    stored = strict(tmp_path / "comparison.json")
    assert stored["judgement"]["families"][0]["arms"][1]["arm"] == label
    assert label in stored["timings"]["to_threshold"]["digits"]
