"""Follows the settings of a run and one of its steps through the package, and counts what they enter.

A reader who wants to change a setting, or the step, has to look at these files. The numbers are limits: they are
lowered when a way gets shorter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import tokenrl
from tokenrl.language.training.arguments import TrainArguments

PACKAGE = str(Path(tokenrl.__file__).parent)
SIZES = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "max_completion_length": 8}
MADE, HOLDING, FILES, CALLS = 3, 14, 37, 700
"""Records of settings that a run makes, files in which a function holds one before the first step, and the files
and calls of a step of 16 completions. Python 3.11 counts comprehensions as calls."""


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """The records of settings, the files that hold them, and the file of each call of the second step."""
    made = {}
    holding = set()
    steps = []
    is_inside = False

    def follow(frame, event, _):
        nonlocal is_inside
        file = frame.f_code.co_filename
        if event in ("call", "return") and frame.f_code.co_name == "training_step":
            is_inside = event == "call"
            steps.extend([[]] if is_inside else [])
        if event != "call" or not file.startswith(PACKAGE):
            return
        if is_inside:
            steps[-1].append(file)
        elif not steps:
            settings = [x for x in frame.f_locals.values() if isinstance(x, TrainArguments)]
            made.update({id(record): record for record in settings})
            holding.update(file for _ in settings)

    options = {"model": "tiny", "quiet": True, "eval_every": 0, **SIZES}
    options["task"] = [{"prompt": f"{number} {number % 7} ="} for number in range(40)]
    options["reward"] = lambda prompts, completions, **_: [len(x) % 3 for x in completions]
    for number, profile in enumerate((None, follow)):  # the first run imports modules
        before = sys.getprofile()
        sys.setprofile(profile or before)
        tokenrl.train(output_dir=str(tmp_path_factory.mktemp(str(number))), **options)
        sys.setprofile(before)
    return made, holding, steps[1]


def test_settings_are_made_once_for_each_reason_and_held_in_few_files(walk):
    made, holding, _ = walk
    assert 2 <= len(made) <= MADE
    assert 10 <= len(holding) <= HOLDING


def test_a_step_enters_few_files_and_checks_nothing_twice(walk):
    calls = walk[2]
    assert 20 <= len({*calls}) <= FILES
    assert 300 <= len(calls) <= CALLS
    assert sum(file.endswith("/settings.py") for file in calls) < 9


@pytest.mark.parametrize("warm", [{}, {"warm_start": True, "warm_start_steps": 2}])
def test_a_run_reads_its_model_once(tmp_path, files, monkeypatch, warm):
    reads = []
    load = AutoModelForCausalLM.from_pretrained
    counted = lambda *args, **options: reads.append(args) or load(*args, **options)  # noqa: E731
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    data, model = str(files / "rows.jsonl"), str(files / "model")
    run = {"task": data, "reward": "exact_match", "model": model, "output_dir": str(tmp_path)}
    tokenrl.train(quiet=True, **run, **warm, **SIZES)
    assert len(reads) == 1
