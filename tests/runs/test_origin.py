"""How a run says that it was started: a typed command, a file of settings, or a program with objects."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tokenrl.language.rewards.library import LIBRARY
from tokenrl.names import NamedFunction, import_source
from tokenrl.runs.origin import hash_of_value, module_hashes, origin_of, repetition


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
    return origin_of("train", vars(Settings(**options)), names, Path("runs/a b/config.json"))[1]


@pytest.mark.parametrize("program", ["/bin/tokenrl", "C:/tokenrl.exe", "/lib/tokenrl/__main__.py"])
def test_a_command_that_was_typed_is_shown_as_it_was(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "train", "--task", "a b"])
    assert origin() == "tokenrl train --task 'a b'"
    assert "tokenrl train --task 'a b'" in repetition(origin())


@pytest.mark.parametrize("program", ["/home/someone/train.py", "/lib/pytest/__main__.py"])
def test_a_program_s_settings_can_be_repeated_by_a_command_if_all_have_names(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program])
    by_name = {"estimator": Inner(NamedFunction("mine.py:half"))}
    for options in ({}, {"task": Path("x")}, {"reward": (paid, "length(max=3)")}, by_name):
        command = "tokenrl train --config 'runs/a b/config.json' --overwrite"
        assert origin(**options) == command


NAMELESS = [{"reward": (lambda completions: completions,)}, {"reward": LIBRARY["length"](max=3)}]
NAMELESS += [{"estimator": Inner(lambda rewards: rewards)}, {"task": SimpleNamespace()}]


@pytest.mark.parametrize("options", NAMELESS, ids=["lambda", "object", "nested", "task"])
def test_no_command_repeats_a_run_with_nameless_objects(options):
    assert origin(**options) == ""
    assert "started from Python" in repetition(origin(**options))[0]


@pytest.mark.parametrize("folder", ["tokenrl", "toy_tasks", "python3.11"])
def test_modules_of_the_user_count_whatever_their_folder_is_called(folder, tmp_path):
    place = tmp_path / folder
    place.mkdir()
    (place / "helper_of_mine.py").write_text("ONE = 1")
    (place / "reward_of_mine.py").write_text("import helper_of_mine")
    import_source(str(place / "reward_of_mine.py"), "reward")
    names = {"module helper_of_mine", "module reward_of_mine"}
    before = module_hashes()
    assert names <= before.keys() and "module pytest" not in before
    (place / "helper_of_mine.py").write_text("ONE = 2")
    after = module_hashes()
    assert {name for name in names if before[name] != after[name]} == {"module helper_of_mine"}


def scaled(scale, *_):
    return lambda completions: [scale for _ in completions]


VALUES = {
    "plain": ({"a": [1, {"x", "y"}]}, {"a": [1, {"x", "z"}]}),
    "array": (np.arange(9.0), np.arange(9.0) + 1e-9),
    "shape": (np.zeros((2, 3)), np.zeros((3, 2))),
    "objects": (np.array(["a", None], object), np.array(["b", None], object)),
    "tensor": (torch.ones(2).bfloat16(), torch.tensor([1, 2]).bfloat16()),
    "function": (scaled(1), scaled(2)),
    "dataclass": (Inner([partial(scaled, 1)]), Inner([partial(scaled, 2)])),
}


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_of_code_has_a_hash_of_its_own_and_equal_ones_share_it(kind):
    same, other = VALUES[kind]
    assert hash_of_value(same) == hash_of_value(copy.deepcopy(same)) != hash_of_value(other)


def test_a_function_may_hold_itself():
    def recursive(scale):
        return lambda n: recursive(scale)(n - 1) if n else scale

    def deep(depth, scale):
        return deep(depth - 1, scale) if depth else hash_of_value(recursive(scale))

    assert deep(0, 1) == deep(50, 1) != deep(0, 2)


def test_what_has_no_stable_form_counts_by_the_name_of_its_type():
    first, again = ([{object(): Path(place)}, object()] for place in "ab")
    assert hash_of_value(first) == hash_of_value(again)
