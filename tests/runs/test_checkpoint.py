"""Checkpoints and other folders: complete or absent, every byte hashed, a state that comes back exactly."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from tokenrl.errors import Refused, Stopped
from tokenrl.runs import checkpoint
from tokenrl.runs.checkpoint import latest_checkpoint, read_state, save_checkpoint, write_state
from tokenrl.runs.folders import atomic_directory, model_directory, verify


def write(folder):
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "sub").mkdir()
    (folder / "sub" / "state.json").write_text('{"a": 1}')


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_saved_checkpoint_is_listed_found_and_not_written_twice(tmp_path):
    path = save_checkpoint(tmp_path / "checkpoints", 100, write, keep=2)
    assert path == tmp_path / "checkpoints" / "step_000100" and names(path.parent) == [path.name]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest.keys() == {"weights.bin", "sub/state.json"} and manifest["weights.bin"][0] == 2048
    verify(path)
    assert latest_checkpoint(path.parent) == (path, [])
    assert latest_checkpoint(tmp_path / "absent") == (None, [])
    save_checkpoint(path.parent, 100, lambda folder: pytest.fail("written twice"), keep=2)
    (path / "weights.bin").write_bytes(b"damaged")
    save_checkpoint(path.parent, 100, write, keep=2)
    verify(path)


def test_older_ones_go_by_number_and_only_after_the_new_one_is_verified(tmp_path, monkeypatch):
    for step in (999_998, 999_999, 1_000_000):  # as text, the last would be the first
        save_checkpoint(tmp_path, step, write, keep=2)
    assert names(tmp_path) == ["step_1000000", "step_999999"]
    assert latest_checkpoint(tmp_path).path.name == "step_1000000"
    monkeypatch.setattr(checkpoint, "fault_of", lambda path: "its bytes are others")
    with pytest.raises(Stopped, match="its bytes are others"):
        save_checkpoint(tmp_path, 1_000_001, write, keep=1)
    assert {"step_1000000", "step_999999"} < set(names(tmp_path))


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left"), RuntimeError("writer failed")])
def test_a_failed_save_stops_removes_the_partial_and_leaves_the_last_good_one(tmp_path, fault):
    def fail(folder):
        write(folder)
        raise fault

    good = save_checkpoint(tmp_path, 1, write, keep=1)
    with pytest.raises(Stopped, match=r"step_000002 could not be written .*Free space there") as caught:
        save_checkpoint(tmp_path, 2, fail, keep=1)
    assert caught.value.__cause__ is fault and str(fault.args[-1]) in str(caught.value)
    assert names(tmp_path) == ["step_000001"]
    verify(good)
    with pytest.raises(Stopped, match="was removed or moved"):  # no run directory is made again
        save_checkpoint(tmp_path / "gone" / "checkpoints", 1, write, keep=1)
    assert names(tmp_path) == ["step_000001"]


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


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: (path / "sub" / "state.json").unlink(), "lacks its file sub/state.json"),
        (lambda path: os.truncate(path / "weights.bin", 100), "file weights.bin was altered or cut short"),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json, so it is not complete"),
        (lambda path: (path / "manifest.json").write_text('{"weights'), "its manifest.json was altered"),
        (lambda path: (path / "manifest.json").write_text("{}"), "its manifest.json was altered"),
        (lambda path: (path / "manifest.json").write_text('{"step": 2, "files": {}}'), "an earlier release"),
    ],
)
def test_damage_is_refused_by_name_and_skipped_over(tmp_path, damage, words):
    good, bad = (save_checkpoint(tmp_path / "checkpoints", step, write, keep=2) for step in (1, 2))
    damage(bad)
    for read in (verify, model_directory):
        with pytest.raises(Refused, match=words):
            read(bad)
    path, skipped = latest_checkpoint(tmp_path / "checkpoints")
    assert path == good and len(skipped) == 1 and str(bad) in skipped[0] and re.search(words, skipped[0])


@pytest.mark.parametrize("every", [97, pytest.param(1, marks=pytest.mark.slow)])
def test_any_changed_byte_of_a_checkpoint_is_detected_and_named(tmp_path, every):
    path = save_checkpoint(tmp_path, 3, lambda folder: (write(folder), write_state(folder, STATE)), keep=1)
    draw, tried = random.Random(0), 0
    for file in (path / "weights.bin", path / "sub" / "state.json", path / "trainer_state.pt"):
        whole = file.read_bytes()
        for place in range(draw.randrange(min(every, len(whole))), len(whole), every):
            flipped = bytes([whole[place] ^ 1 << place % 8])
            for changed in (whole[:place] + flipped + whole[place + 1 :], whole[:place] + whole[place + 1 :]):
                file.write_bytes(changed)
                with pytest.raises(Refused, match=re.escape(file.name)):
                    verify(path)
                tried += 1
        file.write_bytes(whole)
    verify(path)
    assert tried > 50


def test_a_copy_of_a_checkpoint_is_verified_wherever_it_lies(tmp_path):
    with atomic_directory(tmp_path / "models" / "mine") as folder:
        write(folder)
    place = tmp_path / "models" / "mine"
    (place / "weights.bin").write_bytes(b"x")
    for inside in (place, place / "sub"):
        with pytest.raises(Refused, match=r"weights.bin was altered .* copy it elsewhere without manifest"):
            model_directory(inside)
    (place / "manifest.json").unlink()  # what the message advises
    assert model_directory(place) == place
    for foreign in ('{"name": "app", "icons": []}', "[]", '"text"'):  # of another program
        (place / "manifest.json").write_text(foreign)
        assert model_directory(place) == place


STATE = {
    "tensors": {
        "half": torch.tensor([1.5, -0.0, math.nan], dtype=torch.bfloat16),
        "count": torch.tensor(2**62),
        "none": torch.empty(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "array": np.arange(3.0),
    },
    "numbers": [0.1 + 0.2, -0.0, math.inf, 2**200, -1, 5e-324, np.float64(0.5), np.int64(3)],
    "rest": [None, True, "a\u2028\U0001f600", [], {}, ([1], [2.0]), {7: "seven"}],
    "late": lambda: [math.pi],
}


def test_a_state_comes_back_bit_for_bit_and_holds_no_code(tmp_path):
    write_state(tmp_path, STATE)
    found = read_state(tmp_path)
    assert found["numbers"] == [0.1 + 0.2, 0.0, math.inf, 2**200, -1, 5e-324, 0.5, 3]
    assert math.copysign(1, found["numbers"][1]) == -1 and type(found["numbers"][6]) is float
    assert found["rest"] == [None, True, "a\u2028\U0001f600", [], {}, [[1], [2.0]], {7: "seven"}]
    assert found["late"] == [math.pi]
    for name, value in STATE["tensors"].items():
        tensor, again = torch.as_tensor(value), found["tensors"][name]
        assert (again.dtype, again.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            again.contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        )
    torch.save({"code": os.system}, tmp_path / "trainer_state.pt")
    with pytest.raises(Refused, match="holds no state from which a run can continue"):
        read_state(tmp_path)
