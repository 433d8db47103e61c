"""Follows the settings of a run and one of its steps through the package, and counts what they enter.

A reader who wants to change a setting, or the step, has to look at these files. The numbers are limits: they are
lowered when a way gets shorter.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import tokenrl
from tokenrl.language.training.arguments import TrainArguments

PACKAGE = Path(tokenrl.__file__).parent
SIZES = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 8}
MADE, HOLDING, STEP_FILES, STEP_CALLS = 4, 23, 40, 930
"""Records of settings that a run makes, files in which a function holds one before the first step, and the files
and calls of a step of 16 completions; Python 3.11 counts comprehensions as calls."""


class Walk:
    """What the second training step calls, and which files hold the settings before the first."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}
        self.holding: set[str] = set()
        self.calls: Counter[CodeType] = Counter()
        self.steps = 0
        self.is_inside = False

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(PACKAGE)):
            return
        if code.co_name == "training_step":
            self.steps += event == "call"
            self.is_inside = event == "call"
        if event == "call" and self.is_inside and self.steps == 2:
            self.calls[code] += 1
        if event == "call" and not self.steps:
            settings = [x for x in frame.f_locals.values() if isinstance(x, TrainArguments)]
            self.made |= {id(record): record for record in settings}
            self.holding |= {code.co_filename for _ in settings[:1]}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    options: dict[str, Any] = {"model": "tiny", "quiet": True, "eval_every": 0, **SIZES}
    options["task"] = [{"prompt": f"{number} {number % 7} ="} for number in range(40)]
    options["reward"] = lambda prompts, completions, **_: [len(x) % 3 for x in completions]
    tokenrl.train(
        output_dir=str(folder / "first"), **options
    )  # modules are imported, caches filled
    walk = Walk()
    before = sys.getprofile()
    sys.setprofile(walk)
    try:
        tokenrl.train(output_dir=str(folder / "second"), **options)
    finally:
        sys.setprofile(before)
    return walk


def test_settings_are_made_once_for_each_reason_and_held_in_few_files(walk):
    assert walk.steps == SIZES["max_steps"]
    assert 2 <= len(walk.made) <= MADE
    assert 10 <= len(walk.holding) <= HOLDING


def test_a_step_enters_few_files_and_checks_nothing_twice(walk):
    files = {code.co_filename for code in walk.calls}
    assert 20 <= len(files) <= STEP_FILES
    assert 300 <= sum(walk.calls.values()) <= STEP_CALLS
    assert sum(n for code, n in walk.calls.items() if code.co_filename.endswith("/settings.py")) < 9


def test_a_run_reads_its_model_once(tmp_path, files, monkeypatch):
    reads = []
    load = AutoModelForCausalLM.from_pretrained.__func__

    def counted(cls, *args, **options):
        reads.append(args)
        return load(cls, *args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", classmethod(counted))
    options: dict[str, Any] = {"model": str(files / "model"), "reward": "exact_match", **SIZES}
    options["task"] = str(files / "rows.jsonl")
    for folder, warm in (("plain", {}), ("warm", {"warm_start": True, "warm_start_steps": 2})):
        reads.clear()
        tokenrl.train(output_dir=str(tmp_path / folder), **options, **warm)
        assert len(reads) == 1
