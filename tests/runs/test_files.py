"""Files written whole: strict JSON, a failed write leaves the old file, a pipe is written to as it is."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import read_json
from refusals import refused, stopped

from tests.runs.test_session import live
from tokenrl.configuration import read_config
from tokenrl.errors import Refused, Stopped
from tokenrl.files import (
    atomic_directory,
    check_place,
    model_directory,
    verify,
    write_json,
    write_text,
)
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.metrics import append_rows, write_completions
from tokenrl.runs.reader import read_run

unix = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes of a Unix system")

VALUES = [  # and how they come back
    ({"a": math.nan}, {"a": None}),
    ((math.inf, -math.inf), ["Infinity", "-Infinity"]),
    (torch.tensor([1.0, math.nan]), [1.0, None]),
    (np.float32(0.5), 0.5),
    ({"b", "a"}, ["a", "b"]),
    ({1: (1, {math.inf})}, {"1": [1, ["Infinity"]]}),
    (torch.float32, "torch.float32"),
    (json.dumps, "json:dumps"),
    ("\ud800", "?"),
    (True, True),
]


def test_json_is_strict(tmp_path):
    values = {str(index): value for index, (value, _) in enumerate(VALUES)}
    write_json(tmp_path / "x.json", values)
    text = (tmp_path / "x.json").read_text("utf-8")
    back = json.loads(text, parse_constant=pytest.fail)
    assert [back[index] for index in values] == [expected for _, expected in VALUES]


def write_folder(path):
    with atomic_directory(path) as folder:
        write_text(folder / "a", "new")


WRITERS = {
    "report.html": lambda path: write_text(path, "new"),
    "summary.json": lambda path: write_json(path, {}),
    "step_000001.parquet": lambda path: write_completions(path.parent, 1, [{"a": 1}]),
    "model": write_folder,
}


@unix
@pytest.mark.parametrize("kind", ["link to a file", "link to a folder", "dangling link", "pipe"])
@pytest.mark.parametrize("place", ["{}", ".{}.partial", ".{}.old"])
@pytest.mark.parametrize("name", WRITERS)
def test_nothing_is_written_through_a_link_or_a_pipe_in_the_place_of_a_file(
    tmp_path, name, place, kind
):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (outside / "file").write_text("private")
    targets = {"link to a file": outside / "file", "link to a folder": outside}
    if kind == "pipe":
        os.mkfifo(run / place.format(name))
    else:
        (run / place.format(name)).symlink_to(targets.get(kind, outside / "none"))
    if name == "model" and place == "{}" and kind == "dangling link":
        with stopped("model could not be written"):
            write_folder(run / name)
    else:
        WRITERS[name](run / name)
        mode = (run / name).lstat().st_mode
        assert stat.S_ISDIR(mode) if name == "model" else stat.S_ISREG(mode)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "private"


@unix
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", ".lock", "checkpoints", "warm_start", "tensorboard"]
)
def test_logs_locks_and_folders_of_a_run_that_are_links_are_refused_and_their_targets_stay(
    tmp_path, name
):
    run, target = tmp_path / "run", tmp_path / "target"
    run.mkdir()
    target.write_text("private")
    (run / name).symlink_to(target)
    with pytest.raises((Refused, Stopped), match=rf"{name}.*link"):
        append_rows(run, 1, {}) if name == "metrics.jsonl" else RunDirectory(run)
    assert target.read_text() == "private"


@unix
@pytest.mark.parametrize("name", ["config.json", "summary.json", "timings.jsonl"])
def test_a_pipe_in_a_run_is_refused_in_words_and_not_waited_for(tmp_path, name):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    os.mkfifo(tmp_path / name)
    with refused(f"{name} cannot be read .*only regular files are read"):
        _ = read_run(tmp_path).timings


@unix
def test_a_pipe_in_a_sealed_folder_or_for_a_result_is_refused(tmp_path):
    write_folder(tmp_path / "model")
    (tmp_path / "model" / "a").unlink()
    os.mkfifo(tmp_path / "model" / "a")
    with refused("its file a is missing"):
        verify(tmp_path / "model")
    with refused("model/a cannot be written .*a pipe or a device.*Give the name of a file"):
        check_place(tmp_path / "model" / "a")
    (tmp_path / "model" / "manifest.json").unlink()
    with refused("model/a is a pipe or a device"):
        model_directory(tmp_path / "model")


@unix
def test_what_a_link_in_a_sealed_folder_leads_to_keeps_its_permissions(tmp_path):
    (tmp_path / "private.safetensors").write_text("private")
    (tmp_path / "private.safetensors").chmod(0o600)
    with atomic_directory(tmp_path / "model") as folder:
        (folder / "weights.safetensors").symlink_to(tmp_path / "private.safetensors")
    assert (tmp_path / "private.safetensors").stat().st_mode & 0o777 == 0o600
    assert read_json(tmp_path / "model" / "manifest.json") == {}


@unix
def test_a_stream_of_the_process_is_read_and_written_as_it_is(tmp_path):
    reading, writing = os.pipe()
    write_json(Path(f"/dev/fd/{writing}"), {"seed": 3})
    os.close(writing)
    assert read_config(f"/dev/fd/{reading}") == {"seed": 3}
    os.close(reading)
    with (tmp_path / "printed").open("ab") as printed:
        printed.write(b"first\n")
        printed.flush()
        write_text(Path(f"/dev/fd/{printed.fileno()}"), "second")
    assert (tmp_path / "printed").read_text() == "first\nsecond"


@pytest.mark.parametrize(("number", "is_fault"), [(errno.EINVAL, False), (errno.ENOTSUP, False),
                                                  (errno.EIO, True), (errno.ENOSPC, True)])  # fmt: skip
def test_a_system_without_a_flush_of_folders_is_passed_over_and_a_lost_write_is_not(
    tmp_path, monkeypatch, number, is_fault
):
    fsync = os.fsync

    def flush(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    if is_fault:
        with stopped("could not be written"):
            write_json(tmp_path / "x", {})
    else:
        assert live(tmp_path / "run").exit_reason == "finished"
        verify(tmp_path / "run" / "model")
