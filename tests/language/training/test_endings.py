"""Code of a user that calls `sys.exit` ends no run in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import completes
from folders import read_json, write_rows
from tiny_models import quickly

from tokenrl.cli import main

FILE = """
import os, sys, torch
from tokenrl.language import TransformersGenerator

def leave():
    sys.exit(0)

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
def argv(saved, workplace):
    (workplace / "mine.py").write_text(FILE)
    rows = [{"prompt": word} for word in ("the cat", "a dog", "the mat", "on", "the log", "sat")]
    write_rows(workplace / "rows.jsonl", rows)
    return [*QUICK.split(), "--model", str(saved())]


@pytest.mark.parametrize("where", quickly([*WHERE, "words"], {"async", "memory", "sync"}))
def test_sys_exit_in_code_of_the_user_is_a_failure(argv, where, monkeypatch, capsys):
    monkeypatch.setenv("WHERE", where)
    assert main(argv) == (2 if where == "factory" else 1)
    output = capsys.readouterr().err
    assert "Traceback" not in output and ("SystemExit: 0" in output or where == "words")
    assert Path("run/summary.json").exists() == (where != "factory")
    if where != "factory":
        summary = read_json("run/summary.json")
        assert summary["exit_reason"] == "failed" and (
            "SystemExit" in summary["error"] or where == "words"
        )
        monkeypatch.setenv("WHERE", "")
        completes(*argv, "--resume", "auto")
