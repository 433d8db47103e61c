"""The recipe that judges runs which exist without a comparison."""

import runpy
import sys

from folders import RECIPES
from made_runs import rising, write_run

PROGRAMS = RECIPES / "study"


def run(name, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(PROGRAMS / f"{name}.py"), run_name="__main__")


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
