"""How a run says that it was started: a typed command, a file of settings, or a program with objects."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokenrl.language.rewards.library import LIBRARY
from tokenrl.names import NamedFunction
from tokenrl.runs.origin import Origin


@dataclass
class Inner:
    baseline: Any = "rloo"


@dataclass
class Settings:
    max_steps: int = 5
    task: Any = "counting"
    reward: Any = ()
    estimator: Inner = field(default_factory=Inner)


def paid(completions):
    return [0.0 for _ in completions]


def origin(**options):
    names = {"task": "an object"}
    return Origin.of("train", Settings(**options), names, Path("runs/a b/config.json"))


@pytest.mark.parametrize("program", ["/bin/tokenrl", "C:/tokenrl.exe", "/lib/tokenrl/__main__.py"])
def test_a_command_that_was_typed_is_shown_as_it_was(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "train", "--task", "a b"])
    assert origin().command == "tokenrl train --task 'a b'"
    assert "tokenrl train --task 'a b'" in origin().in_words()


@pytest.mark.parametrize("program", ["/home/someone/train.py", "/lib/pytest/__main__.py"])
def test_a_program_s_settings_can_be_repeated_by_a_command_if_all_have_names(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    again = "tokenrl train --config 'runs/a b/config.json' --overwrite"
    by_name = {"estimator": Inner(NamedFunction("mine.py:half"))}
    for options in ({}, {"max_steps": 7}, {"task": Path("x")}, {"reward": (paid, "length(max=3)")}, by_name):
        assert origin(**options).command == again


NAMELESS = [{"reward": (lambda completions: completions,)}, {"reward": LIBRARY["length"](max=3)}]
NAMELESS += [{"estimator": Inner(lambda rewards: rewards)}, {"task": SimpleNamespace()}]


@pytest.mark.parametrize("options", NAMELESS, ids=["lambda", "object", "nested", "task"])
def test_no_command_repeats_a_run_with_nameless_objects(options, monkeypatch):
    assert origin(**options).command == ""
    assert "started from Python" in origin(**options).in_words()[0]
    assert origin(reward=(paid,)).command
    monkeypatch.setattr(paid, "__module__", "__main__")  # no other program can import it
    assert origin(reward=(paid,)).command == ""
