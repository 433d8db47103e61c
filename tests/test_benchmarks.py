"""The benchmarks: their tables from made-up measurements, and each measured once at a small size."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from folders import RECIPES

FOLDER = RECIPES / "benchmarks"
TINY = {"prompts": 2, "group": 4, "length": 4, "layers": 1, "hidden": 16, "intermediate": 16}
TINY |= {"heads": 2, "kv_heads": 1}


@pytest.fixture
def program(monkeypatch):
    """Gives the names of a program, which imports its neighbours from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield lambda name: runpy.run_path(str(FOLDER / name))
    for name in ("one_trainer", "step_against_trl"):
        sys.modules.pop(name, None)


def printed(name: str, *arguments: str, folder: Path) -> str:
    """What a benchmark prints, run as a program."""
    command = [sys.executable, str(FOLDER / name), *arguments]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings |= {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, env=settings, cwd=folder, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def measured(name: str, spec: dict, folder: Path) -> dict:
    return json.loads(printed(name, "--measure", json.dumps(spec), folder=folder).splitlines()[-1])


def cells(text: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first: others for first, *others in rows}


def test_rounds_alternate_and_only_the_first_tries_all_settings(program):
    """The ratio is of rounds in which neither failed."""
    calls = []
    ours = iter([2.0, 1.0, None])

    def run(name, spec):
        calls.append((spec["who"], spec["round"]))
        if spec["who"] == "trl":
            fast = spec["bf16"] and spec["attention"] == "sdpa"
            return {"seconds": 4.0 if fast else 9.0, "peak_mb": 1000.0 + spec["round"]}
        seconds = next(ours)
        return {"seconds": seconds, "peak_mb": 5.0} if seconds else {"error": "out of memory"}

    benchmark = program("step_against_trl.py")
    benchmark["alternate"].__globals__.update(run=run, find_spec=lambda name: True)
    args = argparse.Namespace(rounds=3, tokenrl={}, steps=4)
    row = benchmark["shape_row"]("fixed", args)
    numbers = ["4.000", "1.500", "3.00 (2.00 to 4.00)", "1,002", "5"]
    assert row == ["fixed", "bfloat16 sdpa", *numbers]
    pairs = [(who, number) for number in (1, 2) for who in ("trl", "tokenrl")]
    assert calls == [*[("trl", 0)] * 4, ("tokenrl", 0), *pairs]


@pytest.mark.parametrize(("turns", "wait", "cache"), [(1, 0, 1), (4, 0.001, 1e-9), (12, 0, 1)])
def test_the_policy_writes_as_many_turns_as_the_environment_asks_for(program, turns, wait, cache):
    spec = {"who": "tokenrl", "steps": 2, "options": {"generator_cache": cache}}
    shape = {"prompts": 1, "group": 2, "length": 30, "hidden": 64, "architecture": "qwen3"}
    spec |= {"turns": turns, "wait": wait, "shape": TINY | shape | {"context": 1024}}
    written = 30 * (2 * turns - 1)  # the policy's turns and the answers between them
    # the prompt that the rows share, and each row but for its last token
    once = 11 + 2 * (written - 1)
    # without room for what was read: 40 tokens of each row are read again in the second turn, 100 and 160 later
    again = 0 if cache == 1 else 2 * (40 + 100 + 160)
    assert program("turns_against_trl.py")["measure"](spec)["read"] == [once + again, once]


def test_trainings_are_compared_for_as_long_as_their_completions_agree(program):
    def rows(*norms, length=4.0):
        step = {"reward": 0.5, "completions/mean_length": length}
        return [step | {"grad_norm": norm} for norm in norms]

    verdict, cpu = program("on_your_gpu.py")["verdict"], rows(2.0, 1.0, 1.0)
    assert verdict(cpu, cpu) == ["equal up to rounding", "3 of 3", "0 of 3", "0.0e+00"]
    # a thousandth of the largest, which is 2
    equal = ["equal up to rounding", "3 of 3", "1 of 3", "2.0e-03"]
    assert verdict(cpu, rows(2.0, 1.002, 1.0)) == equal
    assert verdict(cpu, rows(2.0, 1.0, 1.003))[0] == "not equal: grad_norm"
    longer = [*rows(2.0), *rows(9.0, 9.0, length=5.0)]
    assert verdict(cpu, longer)[:2] == ["equal up to rounding", "1 of 3"]
    assert verdict(cpu, longer[::-1])[:2] == ["not equal: the first completions differ", "0 of 3"]
    assert verdict(cpu, rows(2.0, None, 1.0))[0] == "not equal: grad_norm"


@pytest.mark.slow
def test_the_program_for_a_gpu_finds_a_cpu_equal_to_itself(tmp_path):
    table = cells(printed("on_your_gpu.py", "--tiny", folder=tmp_path))
    for name in ("rloo", "grpo, KL in the loss", "ppo, with a critic"):
        assert table[name][:2] == ["equal up to rounding", "2 of 2"]
        assert table[name][2].startswith("0 of ")
    _, theirs, seconds, ratio, _, peak = table["tiny"]
    assert float(seconds) > 0 and float(peak.replace(",", "")) > 50
    assert float(theirs) > 0 if find_spec("trl") else theirs == "not installed" and ratio == ""
    assert float(table["2"][2]) > 0  # two turns


@pytest.mark.slow
def test_turns_are_measured_beside_trl_or_without_it(tmp_path):
    flags = ["--turns", "1", "2", "--wait", "0.001", "--rounds", "1", "--steps", "2"]
    wait, theirs, ours, *others = cells(printed("turns_against_trl.py", *flags, folder=tmp_path))[
        "2"
    ]
    assert wait == "1" and float(ours) > 0 and "3,840" in others
    assert float(theirs) > 0 if find_spec("trl") else theirs == "not installed"


@pytest.mark.slow
@pytest.mark.parametrize("who", ["tokenrl", "trl"])
@pytest.mark.parametrize("changed", [{}, {"lora_r": 2}, {"ends": 6}])
def test_a_measurement(who, changed, tmp_path):
    pytest.importorskip(who)
    measurement = measured(
        "one_trainer.py", {"who": who, "shape": TINY | changed, "steps": 3}, tmp_path
    )
    assert measurement["seconds"] > 0 and measurement["peak_mb"] > 50


STUB = """
import json, os, sys
class GRPOConfig:
    def __init__(self, **settings): pass
class GRPOTrainer:
    def __init__(self, **settings): pass
    def remove_callback(self, callback): pass
    def train(self):
        print(json.dumps({"tokenrl": "tokenrl" in sys.modules, "spin": os.environ.get("GOMP_SPINCOUNT")}))
        sys.exit(0)
"""


@pytest.mark.slow
def test_openmp_waits_in_each_trainer_as_it_does_for_its_users(tmp_path, monkeypatch):
    """What the command tokenrl sets before torch is loaded reaches tokenrl alone."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "trl.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    spec = {"shape": TINY, "steps": 2}
    theirs = measured("one_trainer.py", spec | {"who": "trl"}, tmp_path)
    assert theirs == {"tokenrl": False, "spin": None}
    command = [sys.executable, "-X", "importtime", str(FOLDER / "one_trainer.py")]
    command.append(json.dumps(spec | {"who": "tokenrl"}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    order = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert order.index("tokenrl") < order.index("torch")
