import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from refusals import refused

from tokenrl.runs.directory import RunDirectory, in_use, new_directory, newest, remove_run_files
from tokenrl.runs.resume import cut_back


def tree(folder):
    return {
        str(path.relative_to(folder)): path.is_dir() or path.read_bytes()
        for path in folder.rglob("*")
    }


def finished_run(run):
    for folder in ("model", "completions", "checkpoints/step_000003"):
        (run / folder).mkdir(parents=True)
        (run / folder / "weights.bin").write_text("x")
    for name in (
        "completions/step_000003.parquet",
        "summary.json",
        "timings.jsonl",
        "metrics.jsonl",
    ):
        (run / name).write_text("{}")
    (run / ".lock").touch()
    (run / "config.json").write_text('{"versions": {"tokenrl": "1"}}')
    return run


@contextmanager
def locked(path, **options):
    """The directory of a run that is at work."""
    run = RunDirectory(path, **options)
    yield run.path
    run.release()


@pytest.mark.parametrize(
    ("path", "folder"),
    [
        ("../run", "run"),
        ("runs/../../run", "run"),
        ("new/../run", "work/run"),
        ("../link/../run", "far/run"),
    ],
)
def test_a_path_through_a_parent_directory_is_resolved(path, folder, tmp_path, monkeypatch):
    for name in ("work", "far/away"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    monkeypatch.chdir(tmp_path / "work")
    with locked(path) as run:
        assert run == (tmp_path / folder).resolve()
    assert not (tmp_path / "work" / "new").exists()


@pytest.mark.parametrize("path", ["file", "file/run", "a\0b", "../a\0b", "a\udcff", "../\udcff"])
def test_a_path_that_cannot_be_made_is_refused(path, workplace):
    (workplace / "file").write_text("mine")
    with refused("cannot be used"):
        RunDirectory(path)
    assert tree(workplace) == {"file": b"mine"}


def test_second_run_in_the_directory_is_refused(tmp_path):
    with locked(tmp_path), refused("Another run is using"):
        RunDirectory(tmp_path, may_hold_run=True)
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("make", [None, Path.touch, Path.mkdir, os.mkfifo, "link"])
def test_a_run_is_in_use_only_while_its_lock_is_held(tmp_path, make):
    """Also where the lock may only be read, or cannot be opened at all."""
    lock = tmp_path / ".lock"
    if make == "link":
        lock.symlink_to(tmp_path / "nothing")
    elif make:
        make(lock)
    assert not in_use(tmp_path)
    if make is Path.touch:
        with locked(tmp_path):
            lock.chmod(0o444)
            assert in_use(tmp_path)
        assert not in_use(tmp_path)


def test_existing_run_is_refused_untouched_and_unlocked(tmp_path):
    finished_run(tmp_path)
    before = tree(tmp_path)
    for _ in range(2):
        with refused(r"already holds a run.*overwrite"):
            RunDirectory(tmp_path)
    assert tree(tmp_path) == before


def test_what_a_run_wrote_is_removed_and_nothing_else(tmp_path):
    run, outside = finished_run(tmp_path / "run"), tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (run / "notes.txt").write_text("x")
    for link in (run / "model" / "link", run / "checkpoints" / "step_000009"):
        link.symlink_to(outside)
    before = tree(run)
    with locked(run, may_hold_run=True):
        assert tree(run) == before  # who is refused before it begins has lost nothing
        remove_run_files(run)
        assert set(tree(run)) == {".lock", "notes.txt"}
    assert (outside / "kept").read_text() == "kept"


DEBRIS = (
    "checkpoints/.step_000004.partial/x",
    "checkpoints/.step_000005.old/x",
    ".model.partial/x",
    ".report.html.partial",
    ".metrics.jsonl.partial",
    "completions/.step_000004.parquet.partial",
)


def test_what_a_kill_left_half_written_or_half_removed_goes_when_the_directory_is_next_used(
    tmp_path,
):
    run = finished_run(tmp_path / "run")
    (run / ".download.partial").write_text("mine")
    before = tree(run)
    for name in DEBRIS:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("x")
    RunDirectory(run, may_hold_run=True).release()
    assert tree(run).keys() - {".lock"} == before.keys() - {".lock"}


def test_a_continuation_removes_only_what_the_run_wrote_after_its_step(tmp_path):
    run, outside = finished_run(tmp_path / "run"), finished_run(tmp_path / "other")
    mine = {"checkpoints/step_000009_best": "x", "completions/step_000009_mine.parquet": "x"}
    for name, text in mine.items():
        (run / name).write_text(text)
    (run / "checkpoints" / "step_000009").symlink_to(outside / "checkpoints" / "step_000003")
    checkpoint = run / "checkpoints" / "step_000002"
    (checkpoint / "logs").mkdir(parents=True)
    for log in ("metrics.jsonl", "timings.jsonl"):
        (checkpoint / "logs" / log).write_text('{"step": 0}\n')
    before = tree(outside)
    cut_back(run, checkpoint)
    assert not any((run / "checkpoints" / name).exists() for name in ("step_000003", "step_000009"))
    assert mine.keys() <= tree(run).keys() and tree(outside) == before


@pytest.mark.parametrize("may_hold_run", [False, True])
@pytest.mark.parametrize("name, text", [("notes.txt", "mine"), ("config.json", '{"model_type": "gpt2"}'),
                                        (".download.partial", "half"),
                                        ("config.json", "[1]"), ("metrics.jsonl", "[]")])  # fmt: skip
def test_directory_of_other_people_is_refused_even_with_overwrite(
    tmp_path, may_hold_run, name, text
):
    (tmp_path / name).write_text(text)
    (tmp_path / "model").mkdir()
    before = tree(tmp_path)
    with refused(f"holds no run, but .*{name}"):
        RunDirectory(tmp_path, may_hold_run=may_hold_run)
    assert tree(tmp_path) == before  # not even a lock file


def test_runs_that_start_at_once_take_different_numbers(workplace):
    for name in ("train-2", "train-mine", "other-9"):
        Path("runs", name).mkdir(parents=True)
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: new_directory("train"), range(8)))
    assert sorted(run.path for run in runs) == sorted(
        workplace / f"runs/train-{n}" for n in range(3, 11)
    )
    for run in runs:
        run.release()
    assert newest("train") == 2  # of those that were made for nothing none is left
    shutil.rmtree("runs")
    Path("runs").touch()
    with refused("cannot be used"):
        new_directory("train")
