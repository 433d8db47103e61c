"""Real checkpoints: every command that reads a model refuses a damaged one, naming the file, with code 2."""

from __future__ import annotations

import json
import random
import shutil

import pytest

from tokenrl.cli import main
from tokenrl.errors import Refused
from tokenrl.runs.folders import verify

SMALL = ["--eval-generations", "1", "--prompts-per-step", "2", "--num-generations", "2"]
SMALL += ["--eval-every", "0", "--quiet"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the runs `train` (with critic, 4 updates) and `control`, and the cache of base models."""
    place = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("TOKENRL_CACHE", str(place / "cache"))
        train = ["train", "--task", "vowels", "--estimator", "a2c", "--max-steps", "4", "--save-every", "2"]
        assert main([*train, *SMALL, "--output-dir", "train"]) == 0
        control = ["control", "--env", "bandit", "--max-steps", "2", "--save-every", "1", "--quiet"]
        assert main([*control, "--output-dir", "control"]) == 0
    return place


@pytest.fixture
def damaged(place, tmp_path, monkeypatch):
    """The working directory holds checkpoints as a run does, each with one bit of its weights flipped."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENRL_CACHE", str(place / "cache"))
    for run, step, weights in (("train", 4, "model.safetensors"), ("control", 2, "policy.safetensors")):
        name = f"checkpoints/step_{step:06d}"
        shutil.copytree(place / run / name, tmp_path / run / name)
        flip(tmp_path / run / name / weights, -1)
    return tmp_path


def flip(file, position):
    with file.open("r+b") as handle:
        handle.seek(position, 0 if position >= 0 else 2)
        (byte,) = handle.read(1)
        handle.seek(position, 0 if position >= 0 else 2)
        handle.write(bytes([byte ^ 1 << position % 8]))


MODEL = ["--model", "train/checkpoints/step_000004"]
NEW = ["--max-steps", "1", "--output-dir", "new"]


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--task", "vowels", *MODEL, *NEW],
        ["train", "--task", "vowels", "--reward", MODEL[1], *NEW],
        ["sft", "--task", "rows.jsonl", *MODEL, *NEW],
        ["reward-model", "--data", "rows.jsonl", *MODEL, *NEW],
        ["evaluate", "--task", "vowels", *MODEL],
        ["sample", *MODEL, "--prompt", "abc>"],
        ["lab", "measure", "--task", "vowels", *MODEL],
        ["advise", "--task", "vowels", *MODEL],
        ["control", "--env", "bandit", "--load", "control/checkpoints/step_000002", *NEW],
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_every_command_refuses_a_damaged_checkpoint_and_names_the_file(damaged, command, capsys):
    row = {"prompt": "abc>", "completion": "a", "chosen": "a", "rejected": "b"}
    (damaged / "rows.jsonl").write_text((json.dumps(row) + "\n") * 9)
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    weights = "policy" if command[0] == "control" else "model"
    assert (
        f"its file {weights}.safetensors was altered or cut short. Use another copy or an earlier checkpoint"
        in said
    )
    assert "Traceback" not in said and not (damaged / "new" / "config.json").exists()


def test_the_model_files_of_a_checkpoint_without_the_rest_are_refused_with_the_mend(damaged, place, capsys):
    """The manifest was copied too, and says that files are missing; without it they are just a model."""
    shutil.copytree(place / "train" / "checkpoints" / "step_000004", "copy")
    (damaged / "copy" / "trainer_state.pt").unlink()
    sample = ["sample", "--model", "copy", "--prompt", "abc>"]
    assert main(sample) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "it lacks its file trainer_state.pt" in said and "copy it elsewhere without manifest.json" in said
    (damaged / "copy" / "manifest.json").unlink()
    assert main(sample) == 0


def test_a_flipped_byte_of_any_file_of_a_real_checkpoint_is_detected(place, tmp_path):
    copy = shutil.copytree(place / "train" / "checkpoints" / "step_000004", tmp_path / "step_000004")
    draw = random.Random(0)
    files = [path for path in copy.rglob("*") if path.is_file()]
    assert {"model.safetensors", "config.json", "trainer_state.pt"} < {path.name for path in files}
    for file in files:
        whole = file.read_bytes()
        for position in draw.choices(range(len(whole)), k=2):
            flip(file, position)
            with pytest.raises(Refused, match=file.name):
                verify(copy)
            flip(file, position)
        file.write_bytes(whole)
    verify(copy)


def test_checkpoints_hold_no_code(place):
    """Loading a pickle runs what it says: the only archive is read without that (see `read_state`)."""
    found = [path for run in ("train", "control") for path in (place / run / "checkpoints").rglob("*.*")]
    files = [path for path in found if path.is_file()]
    assert len(files) > 10
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".jinja", ".pt"}
    assert {path.name for path in files if path.suffix == ".pt"} == {"trainer_state.pt"}
