"""Every command that reads a model refuses a damaged one, naming the file, with code 2."""

from __future__ import annotations

import json
import shutil

import pytest
from command_line import completes

from tokenrl.files import atomic_directory

COMMANDS = """
train --task vowels --model saved --max-steps 1 --output-dir new
train --task vowels --reward saved --max-steps 1 --output-dir new
sft --task rows.jsonl --model saved --max-steps 1 --output-dir new
reward-model --data rows.jsonl --model saved --max-steps 1 --output-dir new
evaluate --task vowels --model saved
sample --model saved --prompt abc>
lab measure --task vowels --model saved
control --env bandit --load agent/checkpoints/step_000001 --max-steps 1 --output-dir new
"""


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


@pytest.mark.parametrize("command", COMMANDS.strip().splitlines())
def test_every_command_refuses_a_damaged_checkpoint_and_names_the_file(
    damaged, command, refusal, cache, monkeypatch
):
    monkeypatch.chdir(damaged)
    output = " ".join(refusal(command).split())
    weights = "policy" if "control" in command else "model"
    assert f"its file {weights}.safetensors is missing, altered" in output
    assert not (damaged / "new" / "config.json").exists()
