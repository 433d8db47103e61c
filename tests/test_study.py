"""The study: its plans are plans, and its page says what its raw tables say."""

import runpy
from pathlib import Path

import pytest
import torch

from tokenrl.cli import COMMANDS
from tokenrl.flags import parse
from tokenrl.lab.compare import planning

STUDY = Path(__file__).parents[1] / "recipes" / "study"


@pytest.mark.parametrize("path", sorted(STUDY.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_plan_can_be_run(path, monkeypatch):
    monkeypatch.setattr(planning, "load_base", lambda *_: None)  # the warm start of a task takes a while
    args = parse("compare", COMMANDS["compare"], ["--config", str(path)])
    assert args.output_dir == f"runs/study/{path.stem}"
    assert [arm.label for arm in planning.make_plan(args, print).arms] == list(args.arms)
    assert path.read_text().startswith("# Question ")


def test_positives_and_negatives_are_weighted():
    own, ones = runpy.run_path(str(STUDY / "own.py")), torch.ones(4, dtype=torch.bool)
    totals = torch.tensor([1.0, 0.0, 0.0, 0.0])
    left = {
        name: (totals - own[name](totals, group_size=4, mask=ones[:, None], valid=ones)).tolist()
        for name in ("positives_quarter", "negatives_none")
    }
    third = -1 / 3
    assert left["positives_quarter"] == pytest.approx([0.25, third, third, third])
    assert left["negatives_none"] == [1, 0, 0, 0]


def test_prompts_of_like_and_unlike_difficulty_share_none_and_a_shift_is_declared():
    own = runpy.run_path(str(STUDY / "own.py"))
    like, unlike = ({row["prompt"] for row in own[name]().train_prompts} for name in ("like", "unlike"))
    assert len(like) == len(unlike) == 1024 and not like & unlike
    rewards = [own[name]().reward(["21>"] * 2, ["12", "21"]) for name in ("shifted", "lowered")]
    assert rewards == [[2, 1], [0.5, -0.5]]


def test_the_page_is_what_the_raw_tables_say(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STUDY)
    recipe = runpy.run_path(str(STUDY / "rebuild.py"))
    page = tmp_path / "README.md"
    lines = (STUDY / "README.md").read_text().splitlines(keepends=True)
    page.write_text("".join(line for line in lines if not line.startswith("| `")))
    recipe["rebuild"](page, tmp_path / "figures")
    assert page.read_text() == (STUDY / "README.md").read_text()
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {path.name for path in (STUDY / "figures").iterdir()}
