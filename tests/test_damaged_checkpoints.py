"""Real checkpoints: every command that reads a model refuses a damaged one, naming the file, with code 2."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import completes

from tokenrl.runs.metrics import LOGS

SMALL = "--eval-generations 1 --prompts-per-step 2 --num-generations 2 --eval-every 0 --eval-size 4 --quiet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the runs `train` (with critic, 4 updates) and `control`, and the cache of base models."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TOKENRL_CACHE", str(folder / "cache"))
        train = (
            "train --task vowels --estimator a2c --max-steps 4 --save-every 2 --output-dir train"
        )
        completes(f"{train} {SMALL}")
        completes("control --env bandit --max-steps 2 --save-every 1 --quiet --output-dir control")
    return folder


@pytest.fixture
def damaged(folder, workplace, monkeypatch):
    """The working directory holds checkpoints as a run does, each with one bit of its weights flipped."""
    monkeypatch.setenv("TOKENRL_CACHE", str(folder / "cache"))
    for run, step, weights in (
        ("train", 4, "model.safetensors"),
        ("control", 2, "policy.safetensors"),
    ):
        name = f"checkpoints/step_{step:06d}"
        shutil.copytree(folder / run / name, workplace / run / name)
        whole = (workplace / run / name / weights).read_bytes()
        (workplace / run / name / weights).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return workplace


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
        ["control", "--env", "bandit", "--load", "control/checkpoints/step_000002", *NEW],
    ],
    ids=lambda command: " ".join(command[:4]),
)
def test_every_command_refuses_a_damaged_checkpoint_and_names_the_file(damaged, command, refusal):
    row = {"prompt": "abc>", "completion": "a", "chosen": "a", "rejected": "b"}
    (damaged / "rows.jsonl").write_text((json.dumps(row) + "\n") * 9)
    output = " ".join(refusal(*command).split())
    weights = "policy" if command[0] == "control" else "model"
    assert f"its file {weights}.safetensors is missing, altered" in output
    assert not (damaged / "new" / "config.json").exists()


def test_checkpoints_hold_no_code(folder):
    """Loading a pickle runs what it says: the only archive is read without that (see `read_state`)."""
    result = [
        path for run in ("train", "control") for path in (folder / run / "checkpoints").rglob("*.*")
    ]
    files = {
        path.name
        for path in result
        if path.is_file() and path.suffix not in (".json", ".txt", ".jinja")
    }
    assert files == {"model.safetensors", "policy.safetensors", "trainer_state.pt", *LOGS}
