"""What a recipe says when it is given nothing to run: one clear error, no traceback from the middle of it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(
    "command",
    [
        *("control_2_gridworld --seeds 0", "control_3_numpy --seeds", "control_3_variations --variation"),
        *("control_4_walk --seeds 0", "control_5_agents --seeds", "control_5_agents --seeds 2 0"),
        *("control_contrast --seeds 0", "control_entropy --seeds 0", "control_entropy --betas"),
        "control_variance_horizon --horizons",
    ],
)
def test_nothing_to_run_is_refused_by_its_flag(command, tmp_path, monkeypatch, capsys, handlers):
    name, flag, *values = command.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", flag, *values])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and f"{flag} " in said.err
    assert list(tmp_path.iterdir()) == []
