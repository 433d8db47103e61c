"""A crash between any two system calls leaves the old or the new, complete, and the next write goes well."""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress

import pytest

from tests.runs.test_checkpoint import save
from tokenrl.errors import Refused
from tokenrl.files import atomic_directory, recover, replacing, verify
from tokenrl.runs.checkpoint import checkpoints

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="what crashes is a forked process")
CALLS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}


def keep_states(folder, states, action):
    """Run `action` in a child that copies `folder` before every system call: so would a crash leave it.

    What the process has not yet given to the system is not copied, as a crash would lose it.
    """
    child = os.fork()
    if child == 0:
        number, copying, fsync = 0, False, os.fsync

        def copy(event, arguments=()):
            nonlocal number, copying
            if event in CALLS and not copying:
                number, copying = number + 1, True
                shutil.copytree(folder, states / str(number))
                copying = False

        def copied(handle):
            copy("open")
            fsync(handle)

        try:
            sys.addaudithook(copy)
            os.fsync = copied
            action()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def crashes(start, folder, action):
    """Yield after each crash of `action` at `folder`, which is a copy of `start` at first; it ends whole."""
    states = folder.with_name("states")
    states.mkdir()
    shutil.copytree(start, folder)
    keep_states(folder, states, action)
    finished = folder.rename(folder.with_name("finished"))
    count = len(names(states))
    assert count > 5
    for number in range(1, count + 1):
        (states / str(number)).rename(folder)
        yield number
        shutil.rmtree(folder)
    finished.rename(folder)


def in_two_halves(file, text):
    for half in (text[:2], text[2:]):
        file.write(half.encode())
        file.flush()
        os.fsync(file.fileno())  # here, too, the process may die


def writing(text):
    def write(folder):
        (folder / "sub").mkdir()
        for path in (folder / "a", folder / "sub" / "b"):
            with path.open("wb") as file:
                in_two_halves(file, text)

    return write


def content(folder):
    """The texts of a file, or of all files in a folder, without its manifest."""
    files = [folder / "a", folder / "sub" / "b"] if folder.is_dir() else [folder]
    return {file.read_text() for file in files}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def whole(folder):
    """The newest checkpoint that is whole."""
    for path in reversed(checkpoints(folder)):
        with suppress(Refused):
            verify(path)
            return path


@pytest.fixture
def no_wait(monkeypatch):
    """A process that dies loses nothing of what it wrote, so nobody has to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_save_cut_short_anywhere_leaves_a_complete_checkpoint(tmp_path, no_wait):
    start, folder = tmp_path / "start", tmp_path / "folder"
    for step in (1, 2):
        save(start, step, writing(f"step {step}"), keep=9)
    newest = set()
    for number in crashes(start, folder, lambda: save(folder, 3, writing("step 3"), keep=2)):
        path = whole(folder)
        assert content(path) == {f"step {int(path.name[-6:])}"}, number
        newest.add(path.name)
        save(folder, 4, writing("step 4"), keep=2)
        assert content(whole(folder)) == {"step 4"}
        assert not [name for name in names(folder) if name.startswith(".")], number
    assert newest == {"step_000002", "step_000003"}
    assert names(folder) == ["step_000002", "step_000003"]  # the last time nothing crashed


def replace_file(folder, text):
    with replacing(folder / "x") as partial:
        in_two_halves(partial, text)


def replace_folder(folder, text):
    with atomic_directory(folder / "x") as partial:
        writing(text)(partial)


@pytest.mark.parametrize("replace", [replace_file, replace_folder])
def test_what_is_replaced_when_a_crash_comes_is_the_old_or_the_new(tmp_path, replace, no_wait):
    start, folder, copy = (tmp_path / name for name in ("start", "folder", "copy"))
    start.mkdir()
    replace(start, "old one")
    texts = set()
    for number in crashes(start, folder, lambda: replace(folder, "new one")):
        shutil.copytree(folder, copy)
        if replace is replace_folder:
            recover(folder / "x")
        texts |= content(folder / "x")
        replace(copy, "newest")  # also without recovering first
        assert names(copy) == ["x"] and content(copy / "x") == {"newest"}, number
        shutil.rmtree(copy)
    assert texts == {"old one", "new one"}
