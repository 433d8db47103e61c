"""A comparison that replaces another one removes what that one wrote, and nothing else."""

from pathlib import Path

import pytest
from made_runs import WALK, compared, rising, write_run

import tokenrl
from tokenrl.errors import Refused
from tokenrl.lab.compare import loop
from tokenrl.lab.compare.page import write_tables
from tokenrl.runs.directory import acquire_lock

ARMS = {"reinforce": rising(0.5), "a2c": rising(0.6)}
MINE = (
    *("thesis.tex", "runs/notes.txt", "runs/train-1/config.json", "runs/walk/mine/seed_0.json"),
    *(
        "runs/walk/a2c/seed_0_notes.json",
        "runs/walk/a2c-2/seed_1.json",
        "runs/walk/a2c/seed_77/weights",
    ),
    *("data/seed_0.json", ".model.old/weights", ".lock"),
)
FIRST = Path("runs/walk/a2c/seed_0")


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def again(output_dir=".", **options):
    """Another comparison in the same directory, which writes its plan and the settings of its runs."""
    settings = {"arms": ("reinforce", "rloo"), "overwrite": True, "print_commands": True, **options}
    return tokenrl.compare(**{**WALK, **settings}, output_dir=str(output_dir))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A comparison in the current directory, with its page and with files of the user."""
    monkeypatch.chdir(tmp_path)
    write_tables(compared(Path(), ARMS, seeds=2))
    Path("report.html").touch()
    for name in MINE:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        # which some releases of filelock empty
        Path(name).write_text("years of work" * (name != ".lock"))
    return tmp_path


def test_what_the_comparison_wrote_goes_and_everything_else_stays(here):
    before = files(here)
    planned = again()
    remaining = files(here)
    assert {name: remaining.get(name) for name in MINE} == {name: before[name] for name in MINE}
    assert remaining.keys() - set(MINE) == {
        "plan.json",
        *(f"{run.path}.json" for run in planned.runs()),
    }


def test_a_file_of_others_in_a_run_is_refused_and_stays(here):
    (here / FIRST / "notes.txt").write_text("years of work")
    with pytest.raises(Refused, match=r"seed_0 holds files that no run wrote"):
        again()
    assert (here / FIRST / "notes.txt").read_text() == "years of work"
    (here / FIRST / "notes.txt").unlink()
    assert again().arms[1].label == "rloo", "once they are moved, the same command goes on"


@pytest.mark.parametrize("link", ["runs", "runs/walk", "runs/walk/a2c", str(FIRST)])
def test_nothing_is_removed_behind_a_link(here, link):
    moved = here.parent / f"{here.name}-moved"
    (here / link).rename(moved)
    (here / link).symlink_to(moved)
    before = files(here), files(moved)
    with pytest.raises(Refused, match="lies behind a link"):
        again()
    assert (files(here), files(moved)) == before


@pytest.mark.parametrize("busy", [".", str(FIRST)])
def test_a_comparison_or_a_run_at_work_is_not_removed(here, busy):
    before = files(here)
    lock = acquire_lock(here / busy, "")
    words = "Another process works on the comparison" if busy == "." else "Another run is using"
    with pytest.raises(Refused, match=words):
        again()
    lock.release()
    assert files(here).items() >= before.items()


def test_a_comparison_is_locked_as_long_as_it_makes_its_runs(tmp_path, monkeypatch):
    refused = []

    def execute(runs, root, **options):
        for each in runs:
            write_run(root / each.path, **rising(0.5)(each.seed))
        with pytest.raises(Refused, match="Another process works on the comparison") as error:
            again(root)
        refused.append(error)

    monkeypatch.setattr(loop, "execute", execute)
    comparison = tokenrl.compare(
        **WALK, seeds=2, arms=("reinforce", "a2c"), output_dir=str(tmp_path / "found")
    )
    assert refused and set(comparison.table.runs["state"]) == {"finished"}


def test_a_plan_of_another_program_is_not_replaced(tmp_path):
    (tmp_path / "plan.json").write_text('{"plan": "years of work"}')
    (tmp_path / "report.html").write_text("years of work")
    before = files(tmp_path)
    with pytest.raises(Refused, match=r"plan\.json cannot be read"):
        again(tmp_path)
    assert files(tmp_path).items() >= before.items()


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("years of work")
    with pytest.raises(Refused, match="cannot be used"):
        again(tmp_path / "mine.txt")
    assert files(tmp_path) == {"mine.txt": b"years of work"}


def test_a_directory_beside_the_working_directory_is_taken(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    again("a/../../beside")
    assert files(tmp_path).keys() == {"beside/plan.json", "beside/.lock"} | {
        name for name in files(tmp_path) if name.startswith("beside/runs/")
    }
