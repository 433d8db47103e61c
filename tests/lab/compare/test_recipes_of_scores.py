"""The recipes that read the runs of a comparison, or runs that exist without one."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from made_runs import rising, write_run

RECIPES = Path(__file__).parents[3] / "recipes" / "study"


def run(name, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")


def test_scores_are_normalised_to_the_range_of_the_reward_for_rliable(tmp_path, monkeypatch, capsys):
    area = {"sort": {"a": (0.5, 1.0), "b": (0.0, 0.25)}, "length": {"a": (-1.0, 0.0), "b": (-0.5, -0.25)}}
    rows = [
        {"problem": problem, "arm": arm, "seed": seed, "role": role, "area": score if role[0] == "c" else 9}
        for problem, arms in area.items()
        for arm, scores in arms.items()
        for seed, score in enumerate(scores)
        for role in ("comparison", "tuning")
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "runs.csv", index=False)
    problems = [{"label": "sort", "reward_range": [0, 1]}, {"label": "length", "reward_range": [-1, 0]}]
    (tmp_path / "plan.json").write_text(json.dumps({"plan": {"problems": problems}}))
    monkeypatch.setitem(sys.modules, "rliable", None)
    with pytest.raises(SystemExit, match="pip install rliable"):
        run("overall_scores", [tmp_path], monkeypatch)
    given = {}

    def intervals(scores, aggregate):
        given.update(scores)
        return {arm: aggregate(x) for arm, x in scores.items()}, {arm: np.zeros((2, 1)) for arm in scores}

    profile = lambda scores, grid: ({arm: np.zeros(len(grid)) for arm in scores}, None)  # noqa: E731
    library = SimpleNamespace(get_interval_estimates=intervals, create_performance_profile=profile)
    rliable = SimpleNamespace(library=library, metrics=SimpleNamespace(aggregate_iqm=np.mean))
    monkeypatch.setitem(sys.modules, "rliable", rliable)
    run("overall_scores", [tmp_path], monkeypatch)
    assert {arm: scores.T.tolist() for arm, scores in given.items()} == {
        "a": [[0, 1], [0.5, 1]],  # by problem in the order of their names, then by seed
        "b": [[0.5, 0.75], [0, 0.25]],
    }
    assert "interquartile mean" in capsys.readouterr().out


def test_runs_that_exist_are_judged_by_the_settings_in_which_they_differ(tmp_path, monkeypatch, capsys):
    for end, baseline in ((0.5, "none"), (0.6, "rloo")):
        for seed in range(6):
            config = {
                "estimator": {"baseline": baseline, "gamma": 1.0},
                "seed": seed,
                "output_dir": f"{seed}",
            }
            write_run(tmp_path / f"{baseline}{seed}", config=config, **rising(end)(seed))
    run("compare_existing_runs", sorted(tmp_path.iterdir()), monkeypatch)
    assert "Better than estimator.baseline=none: estimator.baseline=rloo." in capsys.readouterr().out
