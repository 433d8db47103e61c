"""What a run of somebody else names is executed only if the user names it, or trusts the run."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from command_line import completes
from folders import read_json
from refusals import refused

import tokenrl
from tokenrl.cli import main
from tokenrl.configuration import code_in, configured
from tokenrl.errors import Refused
from tokenrl.files import write_json
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.tasks.task import own_task
from tokenrl.language.training.arguments import TrainArguments

WORDS = "".join(f'{{"prompt": "{word}"}}\n' for word in ("cat", "dog", "mat", "log", "one", "two"))
OWN = (
    "def vowels(completions, **_): return [sum(map(text.count, 'aeiou')) for text in completions]\n"
)
EVIL = f"open({{!r}}, 'w').close()\n{OWN}mean = lambda rewards, **_: rewards\ntask = None\n"
SMALL = {"prompts_per_step": 2, "num_generations": 2, "max_steps": 1, "cpu": True, "quiet": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `rewards.py`, `words.jsonl`, and `run`, which was trained with them."""
    folder = tmp_path_factory.mktemp("trusted")
    (folder / "words.jsonl").write_text(WORDS)
    (folder / "rewards.py").write_text(OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "settings"))
        patch.chdir(folder)
        data = {
            "task": "words.jsonl",
            "reward": "rewards.py:vowels",
            "model": "tiny",
            "eval_size": 1,
        }
        tokenrl.train(**data, **SMALL, output_dir="run", max_completion_length=4)
    return folder


@pytest.fixture
def stranger(folder, workplace, monkeypatch):
    """`stranger(**names)`: a copy of the run, whose config.json names other code; `evil.py` tells."""
    shutil.copytree(folder, workplace, dirs_exist_ok=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workplace / "settings"))
    for place in ("run/evil.py", "beside.py", "run/inner/evil.py", "run(1)/evil.py"):
        Path(place).parent.mkdir(exist_ok=True)
        Path(place).write_text(EVIL.format(str(workplace / "executed")))
    Path("run/inner/__init__.py").write_text(EVIL.format(str(workplace / "executed")))
    Path("link.py").symlink_to("run/evil.py")
    Path("run/out.py").symlink_to("../rewards.py")

    def stranger(**names):
        config = read_json("run/config.json")
        write_json(Path("run/config.json"), config | names)

    return stranger


NAMES = {
    "in the run": "run/evil.py:vowels",
    "behind a link": "link.py:vowels",
    "through a link": "run/out.py:vowels",
    "module": "run.evil:vowels",
    "beside it": "beside.py:vowels",
    "module beside it": "beside:vowels",
    "other attribute": "rewards.py:__builtins__",
    "standard library": "subprocess:Popen",
    "attribute of a module": "beside.vowels:x",
    "like a reward with options": "run(1)/evil.py:vowels",
    "like one of the library": "./length(1)/../run(1)/evil.py:vowels",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
@pytest.mark.parametrize("setting", ["task", "reward", "environment"])
def test_no_code_of_a_stranger_is_executed(stranger, setting, name, refusal):
    value = [name] if setting == "reward" else name
    stranger(**{setting: value, "trust_run": True})
    output = refusal("evaluate --model run")
    assert f"{setting} '{name}' " in output and "--trust-run" in output
    assert not Path("executed").exists()


TEXTS = [*NAMES.values(), "a:b/evil.py:vowels", "C:\\run\\evil.py:vowels", "run.py/evil.py:vowels"]
TEXTS += ["reasoning_gym:run/evil.py:vowels", "./reasoning_gym:run/evil.py:vowels", "run/evil.py"]
TEXTS += ["length(target=20)", " length (target=20)", "length:x", "length(1)/evil.py:vowels", "run"]
TEXTS += ["words.jsonl", "in-memory:beside", "vowels", "own/er:beside", "none", ":vowels", ""]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("load", [load_reward, own_task])
def test_a_loader_imports_what_the_type_of_its_field_says(stranger, load, text, monkeypatch):
    """So what passes as no code is none, and a folder of any name executes nothing."""
    imported = []
    monkeypatch.setattr("tokenrl.names.import_source", lambda source, _: imported.append(source))
    with suppress(Refused):
        load(text)
    setting = {load_reward: "reward", own_task: "task"}[load]
    assert imported == [source for *_, source in code_in(TrainArguments, {setting: text})]


TRAINED = {
    "task": "run/evil.py:task",
    "reward": ["run/evil.py:vowels"],
    "environment": "run/evil.py:task",
}
BASELINE = {"baseline": "run/evil.py:mean"}
COMMANDS = {
    "evaluate --model run/model": TRAINED,
    "evaluate --model run/checkpoints/step_000001": TRAINED,
    "sample --model run --prompt cat --num-generations 1": TRAINED,
    "train --reward rewards.py:vowels --output-dir run --resume auto": {
        "environment": "run/evil.py:task"
    },
    "sft --output-dir run --resume auto": {"environment": "run/evil.py:task"},
    "train --config run": TRAINED,
    "train --config run/config.json --task words.jsonl": TRAINED,
    "train --config run --reward rewards.py:vowels --estimator.scale none": {"estimator": BASELINE},
    "train --config run --reward rewards.py:vowels": {
        "estimator": "rloo,baseline=run/evil.py:mean"
    },
    "train --config run --reward rewards.py:vowels --quiet": {"generator": "run/evil.py:task"},
    "train --config run --reward rewards.py:vowels --seed 1": {
        "teacher": "self",
        "teacher_context": "run/evil.py:vowels",
    },
    "train --config run --reward rewards.py:vowels --seed 2": {
        "prompt_weights": "run/evil.py:vowels"
    },
    "reward-model --config run": {"kind": "reward-model", "reward": ["run/evil.py:vowels"]},
    "sft --config run": TRAINED | {"kind": "sft"},
    "control --config run": {"kind": "control", "env": "run/evil.py:Mine-v0"},
    "control --config run --env CartPole-v1": {"kind": "control", "estimator": BASELINE},
    "compare --config run": {"reward": ["run/evil.py:vowels"], "arms": ["rloo", "grpo"]},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_executes_code_of_a_run_that_the_user_did_not_name(stranger, command, capsys):
    stranger(**COMMANDS[command])
    if command.startswith(
        ("control", "compare", "sft --config", "reward-model")
    ):  # which know fewer settings
        write_json(Path("run/config.json"), COMMANDS[command])
    printed = command.startswith("sample")  # without rewards
    assert main(command.split()) == (0 if printed else 2)
    output = capsys.readouterr().err
    reason = (
        "configuration of a run" if "compare" in command else "names code that is not executed: "
    )
    assert reason in output and "Traceback" not in output
    assert not Path("executed").exists() and not Path("runs").exists()


def test_runs_of_ones_own_work_from_anywhere_until_a_file_of_theirs_changes(stranger, monkeypatch):
    Path("run").rename("moved")
    completes("train --config moved --output-dir again")
    for run in ("moved", "again"):
        completes("evaluate --model", run)
    Path("rewards.py").write_text(OWN + "# changed")
    assert main(["evaluate", "--model", "moved"]) == main(["train", "--config", "moved"]) == 2
    completes("evaluate --model moved --trust-run")
    Path("rewards.py").write_text(OWN)
    monkeypatch.setenv("XDG_CONFIG_HOME", os.path.abspath("of-somebody-else"))
    assert main(["evaluate", "--model", "moved"]) == 2
    completes("evaluate --model moved --reward rewards.py:vowels")


def test_what_flags_name_and_what_is_trusted_is_executed(stranger):
    stranger(reward=["run/evil.py:vowels"])
    assert tokenrl.evaluate(model="run", reward="run/evil.py:vowels").metrics
    Path("executed").unlink()
    with refused(r"reward 'run/evil.py:vowels' is looked for in the directory of the run"):
        tokenrl.evaluate(model="run")
    with Path("run/evil.py").open("a") as file:
        file.write("# changed, so that it is executed again")
    assert tokenrl.evaluate(model="run", trust_run=True).metrics
    assert Path("executed").exists()


def test_no_run_says_that_it_is_trusted(stranger):
    stranger(trust_run=True, trust_remote_code=True)
    settings = configured(TrainArguments, "run", "train")
    assert not (settings.trust_run or settings.trust_remote_code)


def test_modules_are_not_looked_for_in_the_run_as_the_current_directory(
    stranger, monkeypatch, refusal
):
    stranger(task="../words.jsonl", reward=["toy_tasks.vowels:load"])
    monkeypatch.chdir("run")
    assert "is looked for in the directory of the run" in refusal("evaluate --model .")


def test_a_relative_folder_of_settings_is_none(stranger, monkeypatch):
    """It would be another one in each directory, also in that of a run of somebody else."""
    monkeypatch.setenv("HOME", os.path.abspath("home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", "here")
    assert main(["evaluate", "--model", "run"]) == 2
    assert main(["train", "--config", "run", "--reward", "rewards.py:vowels"]) == 0
    notes = Path("home/.config/tokenrl/trained_code")
    assert notes.stat().st_mode & 0o777 == 0o600 and not Path("here").exists()
