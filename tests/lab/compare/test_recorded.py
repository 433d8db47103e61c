"""Runs that a program made by itself, judged as two kinds: what is read, what is listed, what is refused."""

from __future__ import annotations

from statistics import fmean

import pytest
from folders import read_json
from made_runs import rising, write_run
from refusals import refused

import tokenrl
from tokenrl.lab import judge_recorded
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.compare.loop import compare_each

NOISE = (-0.03, 0.01, 0.02, -0.01, 0.03, -0.02)


@pytest.fixture
def kinds(tmp_path):
    """Six runs of each kind, which end at .5 and at .7; what is given changes the settings of one of them."""

    def make(**odd):
        runs = {}
        for kind, end, rate in (("old", 0.5, 0.1), ("new", 0.7, 0.2)):
            for seed, noise in enumerate(NOISE):
                config = {
                    "env": "walk",
                    "learning_rate": rate,
                    "seed": seed,
                    "hashes": {"data": "1"},
                }
                config["output_dir"] = f"{kind}{seed}"
                config |= odd.get(f"{kind}{seed}", {})
                folder = tmp_path / f"{kind}{seed}"
                write_run(
                    folder, config=config, **rising(end + noise * (1 + (kind == "new")))(seed)
                )
                runs.setdefault(kind, []).append(str(folder))
        return runs["old"], runs["new"]

    return make


def test_the_candidate_is_judged_and_what_differs_is_listed(kinds, tmp_path, capsys):
    old, new = kinds()
    judged = judge_recorded(old, new)
    (difference,) = judged.family.differences
    gaps = []
    for seed, noise in enumerate(NOISE):
        before, after = (
            fmean(rising(end + noise * factor)(seed)["rewards"][1:])
            for end, factor in ((0.5, 1), (0.7, 2))
        )
        gaps.append(after - before)
    expected = fmean(gaps)
    assert difference.verdict == "better" and difference.adjusted.value == pytest.approx(expected)
    assert judged.settings.to_dict("index") == {
        "learning_rate": {"baseline": "0.1", "candidate": "0.2"}
    }
    codes = []
    file = tmp_path / "verdict.json"
    for require in ("better:candidate", "equivalent:candidate", None):
        args = CompareArguments(
            baseline=tuple(old), candidate=tuple(new), require=require, json=str(file)
        )
        codes.append(compare_each(args))
    assert codes == [0, 3, 0]
    record = read_json(file)
    assert record["settings"] == judged.settings.to_dict("index") and record["schema"] == 1
    assert (record["comparisons"][0]["verdict"], record["comparisons"][0]["pairs"]) == ("better", 6)
    assert "candidate is better than baseline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (
            {"new3": {"hashes": {"data": "2"}}},
            "cannot be compared, as they differ in hashes.data: 1, 2",
        ),
        ({"new3": {"env": "bandit"}}, "differ in env: walk, bandit"),
        ({"new3": {"learning_rate": 0.3}}, "Runs of one kind differ in learning_rate"),
        ({"new3": {"seed": 2}}, "seed 2, is there a second time"),
    ],
    ids=["data", "environment", "another kind", "a seed twice"],
)
def test_runs_that_do_not_belong_together_are_refused(kinds, odd, words):
    with refused(words):
        judge_recorded(*kinds(**odd))


def test_both_kinds_are_needed_and_python_has_a_function_of_its_own(kinds):
    old, new = kinds()
    with refused("of both: --baseline RUN"):
        judge_recorded(old, [])
    with refused("judged by tokenrl.lab.judge_recorded"):
        tokenrl.compare(baseline=old, candidate=new)
