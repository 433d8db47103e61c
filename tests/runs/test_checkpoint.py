import errno
import json
import os
import signal
import subprocess
import sys

import pytest

from tokenrl.errors import Refused, Stopped
from tokenrl.runs import checkpoint
from tokenrl.runs.checkpoint import latest_checkpoint, save_checkpoint, verify_checkpoint


def write(folder):
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "sub").mkdir()
    (folder / "sub" / "state.json").write_text('{"a": 1}')


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_saved_checkpoint_is_complete_listed_and_found(tmp_path):
    path = save_checkpoint(tmp_path, 100, write, keep=None)
    assert path == tmp_path / "step_000100" and names(tmp_path) == ["step_000100"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["step"] == 100 and set(manifest["files"]) == {"weights.bin", "sub/state.json"}
    assert manifest["files"]["weights.bin"]["size"] == 2048
    verify_checkpoint(path)
    assert latest_checkpoint(tmp_path) == (path, [])
    assert latest_checkpoint(tmp_path / "absent") == (None, [])


def test_older_ones_go_only_after_the_new_one_is_verified(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, write, keep=2)
    save_checkpoint(tmp_path, 2, write, keep=2)
    real = verify_checkpoint

    def present_while_verifying(path):
        assert (tmp_path / "step_000001").exists()
        real(path)

    monkeypatch.setattr(checkpoint, "verify_checkpoint", present_while_verifying)
    save_checkpoint(tmp_path, 3, write, keep=2)
    assert names(tmp_path) == ["step_000002", "step_000003"]
    monkeypatch.undo()
    save_checkpoint(tmp_path, 4, write, keep=1)
    assert names(tmp_path) == ["step_000004"]
    with pytest.raises(Refused, match="must be 1 or more"):
        save_checkpoint(tmp_path, 5, write, keep=0)


def test_steps_are_ordered_by_number(tmp_path):
    save_checkpoint(tmp_path, 999_999, write, keep=1)
    newest = save_checkpoint(tmp_path, 1_000_000, write, keep=2)
    assert latest_checkpoint(tmp_path).path == newest
    save_checkpoint(tmp_path, 1_000_001, write, keep=2)
    assert names(tmp_path) == ["step_1000000", "step_1000001"]


def test_failed_verification_of_the_new_one_prunes_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, write, keep=1)
    real = verify_checkpoint

    def altered(path):
        if path.name == "step_000002":
            raise Refused("altered")
        real(path)

    monkeypatch.setattr(checkpoint, "verify_checkpoint", altered)
    with pytest.raises(Stopped, match="altered"):
        save_checkpoint(tmp_path, 2, write, keep=1)
    verify_checkpoint(tmp_path / "step_000001")


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("writer failed")]
)
def test_a_failed_save_stops_removes_the_partial_and_leaves_the_last_good_one(tmp_path, fault):
    def fail(folder):
        write(folder)
        raise fault

    with pytest.raises(Stopped, match="step 1 could not be saved"):
        save_checkpoint(tmp_path, 1, fail, keep=1)
    good = save_checkpoint(tmp_path, 1, write, keep=1)
    with pytest.raises(Stopped, match="step 2 could not be saved") as caught:
        save_checkpoint(tmp_path, 2, fail, keep=1)
    assert caught.value.__cause__ is fault and str(fault.args[-1]) in str(caught.value)
    assert names(tmp_path) == ["step_000001"]
    verify_checkpoint(good)


def test_interrupt_removes_the_partial_and_passes_through(tmp_path):
    def interrupt(folder):
        write(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 1, interrupt, keep=1)
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_kill_while_saving_leaves_the_previous_one(tmp_path, moment):
    code = (
        "import os, pathlib, signal, sys\n"
        "from tokenrl.runs.checkpoint import save_checkpoint\n"
        "def write(folder): (folder / 'weights.bin').write_text('good')\n"
        "def die(*_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "folder, moment = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "save_checkpoint(folder, 1, write, keep=1)\n"
        "if moment == 'renaming': os.rename = die\n"
        "save_checkpoint(folder, 2, lambda f: (write(f), moment == 'writing' and die()), keep=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), moment])
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path) == [".step_000002.partial", "step_000001"]
    assert latest_checkpoint(tmp_path) == (tmp_path / "step_000001", [])
    save_checkpoint(tmp_path, 3, write, keep=2)  # the next save clears what the crash left
    assert names(tmp_path) == ["step_000001", "step_000003"]


def flip(path):
    data = bytearray((path / "weights.bin").read_bytes())
    data[1000] ^= 1
    (path / "weights.bin").write_bytes(data)


@pytest.mark.parametrize(
    "damage, named",
    [
        (flip, "weights.bin"),
        (lambda path: os.truncate(path / "weights.bin", 100), "weights.bin"),
        (lambda path: (path / "sub" / "state.json").unlink(), "sub/state.json"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"weights'), "manifest.json"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json"),
        (lambda path: [(path / name).unlink() for name in ("weights.bin", "manifest.json")], "manifest.json"),
    ],
)
def test_damage_is_refused_by_name_and_skipped_over(tmp_path, damage, named):
    good, bad = (save_checkpoint(tmp_path, step, write, keep=None) for step in (1, 2))
    damage(bad)
    with pytest.raises(Refused, match=named):
        verify_checkpoint(bad)
    path, skipped = latest_checkpoint(tmp_path)
    assert path == good and len(skipped) == 1 and str(bad) in skipped[0] and named in skipped[0]


def test_a_step_is_saved_once_unless_what_is_there_is_damaged(tmp_path):
    path = save_checkpoint(tmp_path, 1, write, keep=1)
    save_checkpoint(tmp_path, 1, lambda folder: pytest.fail("written twice"), keep=1)
    flip(path)
    assert save_checkpoint(tmp_path, 1, write, keep=1) == path
    verify_checkpoint(path)
