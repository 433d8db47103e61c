"""Which tables of scores judge_scores reads, and which it refuses."""

import csv
import math

import numpy as np
import pytest

from tokenrl.errors import Refused
from tokenrl.lab import judge_scores


def test_a_table_may_be_a_csv_file_mappings_or_tuples(tmp_path):
    named = [{"arm": a, "seed": s, "accuracy": s / 8 + i} for i, a in enumerate("ab") for s in range(6)]
    for encoding in ("utf-8", "utf-8-sig"):  # the second is what spreadsheets write
        with open(tmp_path / "scores.csv", "w", encoding=encoding, newline="") as file:
            table = csv.DictWriter(file, ["arm", "seed", "accuracy"])
            table.writeheader()
            table.writerows(named)
        read = judge_scores(tmp_path / "scores.csv", metric="accuracy")
        assert read == judge_scores(named, metric="accuracy") and read.metric == "accuracy"
    assert read.families == judge_scores([tuple(row.values()) for row in named]).families
    assert read.families[0].differences[0].verdict == "better"


def test_seeds_may_be_whole_numbers_of_any_size_and_kind():
    for kind in (str, int, np.int64, float):
        table = [(a, kind(s), float(s)) for a in "ab" for s in range(6)]
        assert list(judge_scores(table).families[0].differences[0].differences) == list(range(6))
    large = [(a, 2**60 + 1 + s, float(s)) for a in "ab" for s in range(6)]
    assert min(judge_scores(large).families[0].differences[0].differences) == 2**60 + 1


GOOD = [(arm, seed, 0.5) for arm in ("ppo", "rloo") for seed in range(6)]


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        ([*GOOD, ("ppo", 6, math.nan)], {}, "Row 12 has the score nan: arm 'ppo', seed 6"),
        ([*GOOD, ("ppo", 6, math.inf)], {}, "leaving failed runs out would flatter"),
        ([*GOOD, ("ppo", 3, 0.1)], {}, "Row 12 gives arm 'ppo', seed 3 a second time"),
        ([("ppo", s, 0.5) for s in range(6)], {}, "only the arm 'ppo'; give two arms or more"),
        (GOOD, {"reference": "rlo"}, "'rlo', which is no arm. Did you mean 'rloo'"),
        (GOOD, {"margin": 0}, "margin"),
        (GOOD, {"margin": math.nan}, "margin"),
        (GOOD, {"margin": -0.1}, "margin"),
        ([("ppo", 0, 0.5), ("rloo", 1, 0.5)], {}, "no seed in common"),
        ([], {}, "no rows"),
        ([("ppo", 0.5, 0.5)], {}, "seed (a whole number)"),
        ([("ppo", math.nan, 0.5)], {}, "seed (a whole number)"),
        ([("ppo", 0, "good")], {}, "Row 0"),
        ([("ppo", 0)], {}, "Row 0"),
        (["ppo"], {}, "Row 0"),
        ([{"arm": "ppo", "seed": 0, "points": 1}], {"metric": "area"}, "score (or area)"),
        ([{"seed": 0, "score": 1}], {}, "Row 0"),
        ("no/such/file.csv", {}, "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_judged_is_refused(table, options, said):
    with pytest.raises(Refused) as refused:
        judge_scores(table, **options)
    assert said in str(refused.value)
