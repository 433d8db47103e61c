"""Code of a user that calls `sys.exit`, in the run or in a process that it forked, ends no run in silence."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_models import quickly

import tokenrl
from tokenrl import Estimator
from tokenrl.cli import main

FILE = """
import os, sys, torch
from tokenrl.language import TransformersGenerator

def leave(code=0):
    if os.environ["HOW"] == "fork":
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            return
        os.environ["HOW"] = os.environ["CHILD"]
    if os.environ["HOW"] == "exit":
        sys.exit(code)
    if os.environ["HOW"] == "error":
        raise ValueError("in the child")

def share(completions, trainer_state=None, **rows):
    if os.environ["WHERE"] == "reward" and trainer_state.global_step == 2:
        leave()
    return [text.count("a") / 9 for text in completions]

async def waiting(completions, trainer_state=None, **rows):
    if os.environ["WHERE"] == "async" and trainer_state.global_step == 2:
        leave()
    return [0.0] * len(completions)

def engine(policy, rows_at_once):
    if os.environ["WHERE"] == "factory":
        leave()
    made = Engine(policy, rows_at_once)
    return made

class Engine(TransformersGenerator):
    calls = syncs = 0
    def generate(self, *args, **options):
        Engine.calls += 1
        if os.environ["WHERE"] == "generate" and Engine.calls == 3:
            leave()
        return super().generate(*args, **options)
    def sync(self, policy):
        Engine.syncs += 1
        if os.environ["WHERE"] == "sync" and Engine.syncs == 2:
            leave()
        return super().sync(policy)

class Memory:
    updates = 0
    def read(self, keys):
        return torch.zeros(len(keys))
    def update(self, keys, **rows):
        Memory.updates += 1
        if os.environ["WHERE"] == "memory" and Memory.updates == 2:
            leave()
    def state_dict(self):
        if os.environ["WHERE"] == "state" and Memory.updates == 2:
            leave()
        return {}
    def load_state_dict(self, state):
        pass

class Words(Exception):
    def __str__(self):
        leave()
        return "words"

def wordy(completions, trainer_state=None, **rows):
    if os.environ["WHERE"] == "words" and trainer_state.global_step == 2:
        raise Words
    return [0.0] * len(completions)
"""
QUICK = """train --task rows.jsonl --reward mine.py:share mine.py:waiting mine.py:wordy --cpu --max-steps 3
--prompts-per-step 2 --num-generations 2 --eval-size 2 --save-every 1 --max-completion-length 6 --threads 1
--eval-generations 0 --generator mine.py:engine --estimator.baseline mine.py:Memory --output-dir run"""
WHERE = ("reward", "async", "factory", "generate", "sync", "memory", "state")


@pytest.fixture
def argv(saved, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(FILE)
    rows = [{"prompt": word} for word in ("the cat", "a dog", "the mat", "on", "the log", "sat")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOW", "exit")
    return [*QUICK.split(), "--model", str(saved())]


@pytest.mark.parametrize("where", quickly([*WHERE, "words"], {"async", "memory", "sync"}))
def test_sys_exit_in_code_of_the_user_is_a_failure(argv, where, monkeypatch, capsys):
    monkeypatch.setenv("WHERE", where)
    assert main(argv) == (2 if where == "factory" else 1)
    output = capsys.readouterr().err
    assert "Traceback" not in output and ("SystemExit: 0" in output or where == "words")
    assert Path("run/summary.json").exists() == (where != "factory")
    if where != "factory":
        summary = json.loads(Path("run/summary.json").read_text())
        assert summary["exit_reason"] == "failed" and (
            "SystemExit" in summary["error"] or where == "words"
        )
        monkeypatch.setenv("WHERE", "")
        assert main([*argv, "--resume", "auto"]) == 0


FORKS = [(where, child) for where in (*WHERE, "callback") for child in ("exit", "error", "returns")]
QUICK_FORKS = {("reward", "exit"), ("memory", "returns"), ("callback", "returns")}


@pytest.mark.parametrize("fork", quickly(FORKS, {*FORKS} - QUICK_FORKS), ids=" ".join)
def test_a_forked_helper_that_ends_or_comes_back_changes_nothing(argv, fork, tmp_path, monkeypatch):
    """The child comes out of the user's code, and its parent trains on."""
    where, child = fork
    owner = os.getpid()
    runs = []
    for of_run, name in (("", "plain"), (where, "forked")):
        for variable, value in {"WHERE": of_run, "HOW": "fork", "CHILD": child}.items():
            monkeypatch.setenv(variable, value)
        folder = tmp_path / name
        folder.mkdir()
        for file in ("mine.py", "rows.jsonl"):
            (folder / file).write_text((tmp_path / file).read_text())
        monkeypatch.chdir(folder)
        result = tokenrl.train(
            **FORKING, model=argv[-1], output_dir=folder / "run", callback=forking
        )
        if os.getpid() != owner:
            os._exit(7)  # it would go on with the tests
        assert result.exit_code == 0 and len(list((folder / "run" / "checkpoints").iterdir())) == 2
        lines = (folder / "run" / "timings.jsonl").read_text().splitlines()
        files = ("model/model.safetensors", "metrics.jsonl")
        runs.append([len(lines), *((folder / "run" / file).read_bytes() for file in files)])
    assert runs[0] == runs[1] and runs[0][0] == 3


FORKING = {
    "task": "rows.jsonl",
    "reward": ("mine.py:share", "mine.py:waiting", "mine.py:wordy"),
    "estimator": Estimator(baseline="mine.py:Memory"),
    "generator": "mine.py:engine",
    **{"prompts_per_step": 2, "num_generations": 2, "max_steps": 3, "max_completion_length": 6},
    **{"eval_size": 2, "eval_generations": 0, "save_every": 1, "cpu": True, "threads": 1},
    "quiet": True,
}


def forking(step, _):
    if os.environ["WHERE"] == "callback" and step == 2:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
        elif os.environ["CHILD"] != "returns":
            raise SystemExit if os.environ["CHILD"] == "exit" else ValueError("in the child")
