"""Checkpoints and other folders: complete or absent, every byte hashed, a state that comes back exactly."""

from __future__ import annotations

import errno
import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from folders import read_json
from refusals import refused, stopped
from safetensors.torch import save_file

from tokenrl.files import atomic_directory, model_directory, verify
from tokenrl.runs.checkpoint import Saver, SavingArguments, read_state, write_state


def write(folder):
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (folder / "sub").mkdir()
    (folder / "sub" / "state.json").write_text('{"a": 1}')


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def save(folder, step, write, *, keep, **state):
    """Save a checkpoint of a training whose model is whatever `write` writes."""
    part = SimpleNamespace(state_dict=lambda: state)
    model = SimpleNamespace(write=write, tensors=list)
    Saver(folder, SavingArguments(keep_checkpoints=keep), model, {"part": part}).save(step, [])
    return folder / f"step_{step:06d}"


def test_older_ones_go_by_number(tmp_path):
    (tmp_path / "checkpoints" / "step_000001_mine").mkdir(parents=True)
    for step in (999_998, 999_999, 1_000_000):  # as text, the last would be the first
        (tmp_path / "checkpoints" / ".step_000001.old").mkdir(parents=True)
        path = save(tmp_path / "checkpoints", step, write, keep=2)
    manifest = read_json(path / "manifest.json")
    assert manifest.keys() == {"weights.bin", "sub/state.json", "trainer_state.pt"}
    assert manifest["weights.bin"][0] == 2048
    assert names(path.parent) == ["step_000001_mine", "step_1000000", "step_999999"]


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOSPC, "No space left"), RuntimeError("writer failed")]
)
def test_a_failed_save_stops_removes_the_partial_and_leaves_the_last_good_one(tmp_path, fault):
    def fail(folder):
        write(folder)
        raise fault

    good = save(tmp_path, 1, write, keep=1)
    with stopped(rf"step_000002 could not be .*{fault.args[-1]}.*Free space") as caught:
        save(tmp_path, 2, fail, keep=1)
    with stopped("where it is until"):  # no run directory is made again
        save(tmp_path / "gone" / "checkpoints", 1, write, keep=1)
    assert caught.value.__cause__ is fault and names(tmp_path) == ["step_000001"]
    verify(good)


@pytest.mark.parametrize("file", ["weights.bin", "sub/state.json", "trainer_state.pt"])
def test_any_changed_byte_of_a_checkpoint_is_detected_and_named(tmp_path, file):
    path = save(tmp_path, 3, write, keep=1, **STATE)
    whole = (path / file).read_bytes()
    for index in range(0, len(whole), 97):
        flipped = bytes([whole[index] ^ 1 << index % 8])
        for changed in (flipped, b""):
            (path / file).write_bytes(whole[:index] + changed + whole[index + 1 :])
            with refused(re.escape(file)):
                verify(path)
    (path / file).write_bytes(whole)
    verify(path)


def test_a_copy_of_a_checkpoint_is_verified_wherever_it_lies(tmp_path):
    """So is the model of a run, but for its card, which people edit."""
    model = tmp_path / "run" / "model"
    model.parent.mkdir()
    with atomic_directory(model) as folder:
        write(folder)
    (model.parent / "metrics.jsonl").touch()
    (model / "README.md").write_text("mine")
    assert model_directory(model.parent) == model and model_directory("owner/name") == "owner/name"
    (model / "weights.bin").write_bytes(b"x")
    for inside in (model.parent, model, model / "sub"):
        with refused(r"weights.bin is missing, altered.*a copy without manifest"):
            model_directory(inside)
    (model / "manifest.json").unlink()  # what the message advises
    assert model_directory(model) == model
    (model / "manifest.json").write_text('{"name": "app", "icons": []}')  # of another program
    assert model_directory(model) == model


TENSORS = [
    torch.tensor([1.5, -0.0, math.nan], dtype=torch.bfloat16),
    torch.tensor(2**62),
    torch.empty(0, 3),
]
TENSORS += [torch.arange(6.0).reshape(2, 3).T, np.arange(3.0)]
NUMBERS = [0.1 + 0.2, -0.0, math.inf, 2**200, -1, 5e-324, np.float64(0.5), np.int64(3)]
REST = [None, True, "a\u2028\U0001f600", [], {}, ([1], [2.0]), {7: "seven"}]
STATE = {"tensors": TENSORS, "numbers": NUMBERS, "rest": REST}


def test_a_state_comes_back_bit_for_bit_and_holds_no_code(tmp_path):
    write_state(tmp_path, STATE, "this run")
    state = read_state(tmp_path)
    assert repr(state["numbers"]) == repr([*NUMBERS[:6], 0.5, 3]) and state["rest"] == REST
    for value, again in zip(TENSORS, state["tensors"], strict=True):
        tensor = torch.as_tensor(value)
        assert again.dtype == tensor.dtype
        torch.testing.assert_close(again, tensor, rtol=0, atol=0, equal_nan=True)
    torch.save({"code": os.system}, tmp_path / "trainer_state.pt")
    with refused("holds no state from which a run can continue"):
        read_state(tmp_path)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    with atomic_directory(tmp_path / "model") as folder:
        write(folder)
        # makes files of mode 600
        save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    (tmp_path / "usual").touch()
    os.umask(before)
    modes = {path.stat().st_mode for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "usual").stat().st_mode}
