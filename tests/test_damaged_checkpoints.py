"""Every command that reads a model refuses a damaged one, naming the file, with code 2."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import completes

from tokenrl.files import atomic_directory

NEW = ["--max-steps", "1", "--output-dir", "new"]
COMMANDS = [
    ["train", "--task", "vowels", "--model", "saved", *NEW],
    ["train", "--task", "vowels", "--reward", "saved", *NEW],
    ["sft", "--task", "rows.jsonl", "--model", "saved", *NEW],
    ["reward-model", "--data", "rows.jsonl", "--model", "saved", *NEW],
    ["evaluate", "--task", "vowels", "--model", "saved"],
    ["sample", "--model", "saved", "--prompt", "abc>"],
    ["lab", "measure", "--task", "vowels", "--model", "saved"],
    ["control", "--env", "bandit", "--load", "agent/checkpoints/step_000001", *NEW],
]


@pytest.fixture(scope="module")
def damaged(files, tmp_path_factory):
    """A folder with a saved model and the run of an agent, each with one bit of its weights flipped."""
    folder = tmp_path_factory.mktemp("damaged")
    with atomic_directory(folder / "saved") as sealed:
        shutil.copytree(files / "model", sealed, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        completes("control --env bandit --max-steps 1 --save-every 1 --quiet --output-dir agent")
    row = {"prompt": "abc>", "completion": "a", "chosen": "a", "rejected": "b"}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * 9)
    for file in ("saved/model", "agent/checkpoints/step_000001/policy"):
        path = folder / f"{file}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    return folder


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:4]))
def test_every_command_refuses_a_damaged_checkpoint_and_names_the_file(
    damaged, command, refusal, cache, monkeypatch
):
    monkeypatch.chdir(damaged)
    output = " ".join(refusal(*command).split())
    weights = "policy" if command[0] == "control" else "model"
    assert f"its file {weights}.safetensors is missing, altered" in output
    assert not (damaged / "new" / "config.json").exists()
