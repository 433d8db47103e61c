"""The recipes that read the runs of a comparison, or runs that exist without one."""

import runpy
import sys
from unittest.mock import MagicMock

import numpy as np
import pytest
from folders import RECIPES
from made_runs import rising, write_run

from tokenrl.runs.files import write_json

PROGRAMS = RECIPES / "study"


def run(name, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")


RUNS = """problem,arm,seed,role,area
sort,a,0,comparison,.5
sort,a,1,comparison,1
sort,a,1,tuning,9
length,a,0,comparison,-1
length,a,1,comparison,0"""
RANGES = {"sort": [0, 1], "length": [-1, 0]}


def test_scores_are_normalised_to_the_range_of_the_reward_for_rliable(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "runs.csv").write_text(RUNS)
    problems = [{"label": name, "reward_range": ends} for name, ends in RANGES.items()]
    write_json(tmp_path / "plan.json", {"plan": {"problems": problems}})
    monkeypatch.setitem(sys.modules, "rliable", None)
    with pytest.raises(SystemExit, match="pip install rliable"):
        run("overall_scores", [tmp_path], monkeypatch)
    rliable = MagicMock()
    library = rliable.library
    library.get_interval_estimates.return_value = {"a": np.zeros(1)}, {"a": np.zeros((2, 1))}
    library.create_performance_profile.return_value = {"a": np.zeros(6)}, None
    monkeypatch.setitem(sys.modules, "rliable", rliable)
    run("overall_scores", [tmp_path], monkeypatch)
    scores = library.get_interval_estimates.call_args.args[0]["a"]
    # by problem in the order of their names, then by seed
    assert scores.T.tolist() == [[0, 1], [0.5, 1]]
    assert "interquartile mean" in capsys.readouterr().out


def test_runs_that_exist_are_judged_by_the_settings_in_which_they_differ(
    tmp_path, monkeypatch, capsys
):
    for end, baseline in ((0.5, "none"), (0.6, "rloo")):
        for seed in range(6):
            config = {
                "estimator": {"baseline": baseline, "gamma": 1.0},
                "seed": seed,
                "output_dir": f"{seed}",
                "code": {"mine.py:f": f"{seed}"},
                "hashes": {"data": "1"},
            }
            reason = ("finished", "no-improvement", "callback", "learnt", "stuck", "solved")[seed]
            values = rising(end, summary={"exit_reason": reason})(seed)
            write_run(tmp_path / f"{baseline}{seed}", config=config, **values)
    run("compare_existing_runs", sorted(tmp_path.iterdir()), monkeypatch)
    printed = capsys.readouterr().out
    assert "Better than estimator.baseline=none: estimator.baseline=rloo." in printed
    assert printed.count("0 of 6 runs failed") == 2
