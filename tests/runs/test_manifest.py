"""Any change of any file of a sealed folder is detected, and named; nothing else is."""

from __future__ import annotations

import json
import os
import random
import re

import pytest

from tokenrl.errors import Refused
from tokenrl.runs.checkpoint import latest_checkpoint, save_checkpoint, verify_checkpoint, verify_source
from tokenrl.runs.files import write_json
from tokenrl.runs.manifest import is_sealed, seal, verify


def write(folder):
    """Weights, a state and a tokenizer's text, as a training writes them."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file({"a": torch.randn(64, 32), "b": torch.randn(64)}, folder / "model.safetensors")
    write_json(folder / "trainer_state.json", {"step": 3, "mean": 0.1, "names": ["x", "ß"]})
    (folder / "adapter").mkdir()
    (folder / "adapter" / "merges.txt").write_text("a b\nc d\n")


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path / "checkpoints", 3, write, keep=None)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def put(file, data):
    """Overwrite in place: a file system may flush one that is emptied first, which takes milliseconds."""
    with file.open("r+b") as handle:
        handle.write(data)
        handle.truncate()


def check_every_change(folder, positions):
    """Flip one bit at, remove, and add one byte at, each of the positions that are given for a file."""
    checked = 0
    for file in files_of(folder):
        whole = file.read_bytes()
        for place in positions(len(whole)):
            flipped = bytes([whole[place] ^ 1 << place % 8])
            for changed in (
                whole[:place] + flipped + whole[place + 1 :],
                whole[:place] + whole[place + 1 :],
                whole[:place] + whole[place : place + 1] + whole[place:],
            ):
                put(file, changed)
                with pytest.raises(Refused, match=re.escape(file.name)):
                    verify_checkpoint(folder)
                checked += 1
        for changed in (
            whole[:-1],
            whole[: len(whole) // 2],
            b"",
            whole + b"\0",
            whole + b"\n",
            b" " + whole,
        ):
            put(file, changed)
            with pytest.raises(Refused, match=re.escape(file.name)):
                verify_checkpoint(folder)
        put(file, whole)
    verify_checkpoint(folder)
    return checked


def test_sampled_bytes_of_a_checkpoint(saved):
    draw = random.Random(0)
    assert (
        check_every_change(saved, lambda size: [0, size - 1, *draw.choices(range(size), k=40)]) == 4 * 42 * 3
    )


@pytest.mark.slow
def test_every_byte_of_a_checkpoint(saved):
    sizes = [file.stat().st_size for file in files_of(saved)]
    assert check_every_change(saved, range) == 3 * sum(sizes) and 9_000 < sum(sizes) < 50_000


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda path: (path / ".DS_Store").write_bytes(b""), r"holds \.DS_Store, .* Remove it\.$"),
        (lambda path: (path / "adapter" / "more").write_text("x"), "holds adapter/more, "),
        (lambda path: (path / "empty").mkdir(), "holds empty, "),
        (lambda path: os.symlink("/", path / "root"), "holds root, "),
        (lambda path: (path / "trainer_state.json").unlink(), "lacks its file trainer_state.json"),
        (lambda path: (path / "adapter").rename(path / "other"), "lacks its file adapter/merges.txt"),
        (
            lambda path: [(path / "model.safetensors").unlink(), (path / "model.safetensors").mkdir()],
            "its model.safetensors is no longer a file",
        ),
        (
            lambda path: [
                (path / "model.safetensors").rename(path.parent / "weights"),
                (path / "model.safetensors").symlink_to(path.parent / "weights"),
            ],
            "its model.safetensors is no longer a file",
        ),
        (
            lambda path: [
                (path / "manifest.json").rename(path.parent / "elsewhere"),
                (path / "manifest.json").symlink_to(path.parent / "elsewhere"),
            ],
            "its manifest.json was altered",
        ),
        (
            lambda path: [(path / "manifest.json").unlink(), (path / "manifest.json").mkdir()],
            "cannot be read",
        ),
        (lambda path: (path / "manifest.json").unlink(), "no manifest.json, so it is not complete"),
        (lambda path: (path / "manifest.json").write_text("[" * 10), "its manifest.json was altered"),
        (lambda path: (path / "manifest.json").write_text("7"), "its manifest.json was altered"),
    ],
)
def test_files_that_are_lost_added_or_replaced_are_named(saved, damage, words):
    damage(saved)
    with pytest.raises(Refused, match=words):
        verify_checkpoint(saved)
    with pytest.raises(Refused, match=words):
        verify_source(saved)  # as a model
    path, skipped = latest_checkpoint(saved.parent)
    assert path is None and len(skipped) == 1 and re.search(words, skipped[0])


@pytest.mark.parametrize("change", [{"files": {}}, {"step": 4}, {"more": 1}, {"sha256": "0" * 64}])
def test_a_manifest_with_other_content_is_refused(saved, change):
    """An emptied list of files, above all: without it nothing would be compared."""
    manifest = saved / "manifest.json"
    content = json.loads(manifest.read_text()) | change
    manifest.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    with pytest.raises(Refused, match=r"its manifest.json was altered"):
        verify_checkpoint(saved)


def test_a_manifest_of_an_earlier_release_is_called_so(saved):
    content = json.loads((saved / "manifest.json").read_text())
    del content["sha256"]
    (saved / "manifest.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    with pytest.raises(Refused, match=r"earlier release of tokenrl, .* copy it without manifest.json"):
        verify_checkpoint(saved)


def test_a_checkpoint_renamed_to_another_step_is_refused_and_a_copy_is_not(saved):
    copy = saved.rename(saved.with_name("best"))
    verify_checkpoint(copy)
    other = copy.rename(saved.with_name("step_000004"))
    with pytest.raises(Refused, match="it is the checkpoint of step 3"):
        verify_checkpoint(other)
    assert latest_checkpoint(saved.parent).path is None
    longer = other.rename(saved.with_name("step_0000003"))
    with pytest.raises(Refused, match="it is the checkpoint of step 3"):
        verify_checkpoint(longer)


def test_a_damaged_checkpoint_is_a_damaged_source_wherever_it_lies(saved, tmp_path):
    verify_source(saved)
    verify_source(saved / "adapter")
    copy = tmp_path / "models" / "mine"
    copy.parent.mkdir()
    (saved / "model.safetensors").write_bytes(b"x")
    for place in (saved, saved / "adapter", copy, copy / "adapter"):
        if place == copy:
            saved.rename(copy)
        with pytest.raises(Refused, match=r"model.safetensors was altered .* copy it without manifest.json"):
            verify_source(place)
    (copy / "manifest.json").unlink()  # what the message advises
    verify_source(copy)
    copy.rename(saved)  # but in the place of a checkpoint, a manifest is due
    with pytest.raises(Refused, match=r"no manifest\.json"):
        verify_source(saved)


@pytest.mark.parametrize("foreign", ['{"name": "app", "icons": []}', "[]", '"text"'])
def test_the_manifest_of_another_program_is_not_judged(tmp_path, foreign):
    assert not is_sealed(tmp_path)
    (tmp_path / "manifest.json").write_text(foreign)
    verify_source(tmp_path)
    assert not is_sealed(tmp_path)


def test_only_the_newest_that_verifies_is_read(tmp_path, monkeypatch):
    from tokenrl.runs import checkpoint

    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, write, keep=None)
    (tmp_path / "step_000003" / "model.safetensors").unlink()
    read = []
    monkeypatch.setattr(
        checkpoint, "verify", lambda path, **mend: (read.append(path.name), verify(path, **mend))[1]
    )
    path, skipped = latest_checkpoint(tmp_path)
    assert path == tmp_path / "step_000002" and len(skipped) == 1
    assert read == ["step_000003", "step_000002"]


def test_a_link_among_the_files_cannot_be_sealed_away(tmp_path):
    def linked(folder):
        write(folder)
        (folder / "link").symlink_to(folder / "model.safetensors")

    from tokenrl.errors import Stopped

    with pytest.raises(Stopped, match="its link is no longer a file"):
        save_checkpoint(tmp_path, 1, linked, keep=None)
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain")
    seal(tmp_path / "plain")
    assert verify(tmp_path / "plain", mend="") is None
