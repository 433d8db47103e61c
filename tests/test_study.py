"""The study: its plans are plans, and its page says what its raw tables say."""

import runpy
import sys
from pathlib import Path

import pytest

from tokenrl.cli import COMMANDS
from tokenrl.flags import parse
from tokenrl.lab.compare.planning import make_plan

STUDY = Path(__file__).parents[1] / "recipes" / "study"


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plan_can_be_run(path):
    args = parse("compare", COMMANDS["compare"], ["--config", str(path)])
    assert args.output_dir == f"runs/study/{path.stem}" and args.margin == 0.02
    assert len(make_plan(args, print).arms) == 9
    head = path.read_text().partition("\ntask:")[0].splitlines()
    assert all(line.startswith("#") for line in head)


def test_the_page_is_what_the_raw_tables_say(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rebuild.py"])
    recipe = runpy.run_path(str(STUDY / "rebuild.py"))
    page = tmp_path / "README.md"
    lines = (STUDY / "README.md").read_text().splitlines(keepends=True)
    page.write_text("".join(line for line in lines if not line.startswith("| `")))
    recipe["rebuild"](page, tmp_path / "figures")
    assert page.read_text() == (STUDY / "README.md").read_text()
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {path.name for path in (STUDY / "figures").iterdir()}
