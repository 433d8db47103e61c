"""The benchmark of a step: its table and its numbers from made-up measurements, and one real measurement."""

from __future__ import annotations

import argparse
import json
import math
import os
import runpy
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from tokenrl.language import load_task

FOLDER = Path(__file__).parent.parent / "recipes" / "benchmarks"
TINY = {"prompts": 2, "group": 4, "length": 4, "layers": 1, "hidden": 16, "intermediate": 16}
TINY |= {"heads": 2, "kv_heads": 1}
SEVEN = [9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0]  # the first of the seven lies outside the last six


@pytest.fixture
def program(monkeypatch):
    """Gives the names of a program, which imports its neighbours from its folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield lambda name: runpy.run_path(str(FOLDER / name))
    for name in ("gpu_parts", "one_race", "one_trainer", "step_against_trl"):
        sys.modules.pop(name, None)


@pytest.fixture
def benchmark(program):
    """The names of the program that measures a step."""
    return program("step_against_trl.py")


def results(*seconds_and_peaks):
    """What a trainer's process returns by round, None where it failed."""
    return [
        entry and {"seconds": [9.0, entry[0]], "peak_mb": entry[1]} for entry in seconds_and_peaks
    ]


def test_a_row_has_medians_ratios_of_rounds_and_the_highest_peak(benchmark):
    theirs = results((4.0, 900.0), (2.0, 1000.0), (3.0, 800.0), (9.0, 100.0))
    ours = results((2.0, 500.0), (0.5, 400.0), (3.0, 300.0), None)
    assert benchmark["times"](theirs, ours, 2) == ["3.500", "2.000", "2.00 (1.00 to 4.00)"]
    assert (benchmark["peak"](theirs), benchmark["peak"]([None])) == ("1,000", "")
    assert benchmark["times"](theirs[:1], [None], 2) == ["4.000", "failed", ""]
    missing = "failed" if find_spec("trl") else "not installed"
    assert benchmark["times"]([None], ours[:1], 2) == [missing, "2.000", ""]
    assert benchmark["steady"](SEVEN, 6) == 2.0  # of 9 9 9 1 2 3


def test_best_setting_is_found_in_the_first_round_alone(benchmark):
    calls = []

    def run(spec):
        calls.append((spec["who"], spec.get("bf16"), spec.get("attention")))
        if spec["who"] == "trl" and not spec["bf16"] and spec["attention"] == "sdpa":
            return None  # one setting fails
        seconds = 3.0 if spec.get("attention") == "eager" else 4.0
        return {"seconds": [seconds + spec.get("bf16", 0)] * 4, "peak_mb": 10.0}

    names = benchmark["alternate"].__globals__
    names |= {"run": run, "find_spec": lambda name: True}
    args = argparse.Namespace(rounds=3, tokenrl={}, steps=4)
    best, theirs, ours = benchmark["alternate"]("fixed", {"steps": 4}, benchmark["SETTINGS"], args)
    assert best == {"bf16": False, "attention": "eager"}
    assert benchmark["times"](theirs, ours, 4)[:2] == ["3.000", "4.000"]
    tried = [("trl", *setting.values()) for setting in benchmark["SETTINGS"]]
    once = [("tokenrl", None, None), ("trl", False, "eager")]
    assert calls == [*tried, *once, *once, once[0]]


@pytest.fixture
def episodes(program):
    """The names of the program that measures episodes of several turns."""
    return program("turns_against_trl.py")


SMALL = TINY | {"prompts": 1, "group": 2, "length": 30, "hidden": 64, "architecture": "qwen3"}


@pytest.mark.parametrize(("turns", "wait", "cache"), [(1, 0, 1), (4, 0.001, 1e-9), (12, 0, 1)])
def test_the_policy_writes_as_many_turns_as_the_environment_asks_for(episodes, turns, wait, cache):
    spec = {"who": "tokenrl", "steps": 1, "options": {"generator_cache": cache}}
    spec |= {"turns": turns, "wait": wait, "shape": SMALL | {"context": 1024}}
    measured = episodes["measure"](spec)
    written = 30 * (2 * turns - 1)  # the policy's turns and the answers between them
    # the prompt that the rows share, and each row but for its last token
    once = 11 + 2 * (written - 1)
    # without room for what was read: 40 tokens of each row are read again in the second turn, 100 and 160 later
    again = 0 if cache == 1 else 2 * (40 + 100 + 160)
    assert measured["read"] == [once + again, once]
    assert len(measured["seconds"]) == 1


def test_an_episode_of_other_turns_is_no_measurement(episodes, monkeypatch):
    spec = {"who": "tokenrl", "steps": 1, "options": {}, "turns": 2, "wait": 0}
    spec["shape"] = SMALL | {"context": 1024}
    monkeypatch.setitem(episodes["chained_model"].__globals__, "CERTAIN", 0.0)
    with pytest.raises(SystemExit, match="numbers of tokens"):
        episodes["measure"](spec)


@pytest.mark.slow
def test_turns_are_measured_beside_trl_or_without_it(tmp_path):
    command = [sys.executable, str(FOLDER / "turns_against_trl.py"), "--turns", "1", "2"]
    command += ["--wait", "0.001", "--rounds", "1", "--steps", "2"]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=settings, cwd=tmp_path, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *_, cells = (line.strip("| ").split(" | ") for line in done.stdout.splitlines())
    turns, wait, theirs, ours = cells[:4]
    assert (turns, wait) == ("2", "1") and float(ours) > 0 and "3,840" in cells
    assert float(theirs) > 0 if find_spec("trl") else theirs == "not installed"


def history(seconds, steps, reward=0.96):
    """Four evaluations behind the first, at steps one apart, whose mean is the reward."""
    later = [(steps - k, seconds - k, reward + 0.01 * (k - 1.5)) for k in (3, 2, 1, 0)]
    return [(0, 5.0, 0.1), *later]


def test_a_race_is_told_by_medians_over_seeds(benchmark):
    races = [((20.0, 40), (10.0, 50)), ((30.0, 60), (10.0, 40)), ((12.0, 50), (12.0, 60))]
    finished = [[history(*trl), history(*ours)] for trl, ours in races]
    cells = ["0.100 to 0.95", "20.0 (50)", "10.0 (50)", "2.00 (1.00 to 3.00)"]
    assert benchmark["race_cells"](0.95, finished) == [*cells, "3 of 3 seeds"]
    missed = [history(40.0, 200, 0.9), history(9.0, 30)]
    finished += [missed, [history(9.0, 30)]]
    assert benchmark["race_cells"](0.95, finished) == [*cells, "3 of 5 seeds"]
    assert benchmark["race_cells"](0.95, [missed]) == ["0.95", "", "", "", "0 of 1 seeds"]
    mean = benchmark["recent_reward"]
    assert mean(history(20.0, 40)) == pytest.approx(0.96) and mean(history(1.0, 9)[:3]) == -math.inf


@pytest.fixture
def gpu(program):
    """The names of the program for a machine with a GPU."""
    return program("on_your_gpu.py")


def rows_of(*norms, length=4.0):
    return [{"reward": 0.5, "completions/mean_length": length, "grad_norm": norm} for norm in norms]


def test_trainings_are_compared_for_as_long_as_their_completions_agree(gpu):
    verdict, cpu = gpu["verdict"], rows_of(2.0, 1.0, 1.0)
    assert verdict(cpu, cpu)[0] == "equal up to rounding"
    # a thousandth of the largest, which is 2
    words, largest = verdict(cpu, rows_of(2.0, 1.002, 1.0))
    assert words == "equal up to rounding"
    assert largest["grad_norm"] == (pytest.approx(0.002), pytest.approx(0.00201))
    assert verdict(cpu, rows_of(2.0, 1.0, 1.003))[0] == "not equal: grad_norm"
    longer = [*rows_of(2.0), *rows_of(9.0, 9.0, length=5.0)]
    words, largest = verdict(cpu, longer)
    assert words == "equal up to rounding in the first 1 of 3 steps, after which completions differ"
    assert largest["grad_norm"][0] == 0
    words, largest = verdict(cpu, rows_of(2.5, 1.0, 1.0, length=5.0))
    assert words.startswith("not equal: the completions of the first step differ")
    assert largest["grad_norm"][0] == 0.5  # the first step is compared all the same
    assert verdict(cpu, cpu[:2])[0] == "not equal: 2 steps in place of 3"
    lost = rows_of(2.0, None, 1.0)
    assert (
        verdict(lost, lost)[0] == "equal up to rounding"
        and verdict(cpu, lost)[0] == "not equal: grad_norm"
    )


def test_a_part_that_fails_is_a_line_and_the_others_are_there(gpu):
    here = dict.fromkeys(gpu["ESTIMATORS"], rows_of(2.0))
    there = here | {"rloo": {"error": "ValueError: a | b"}}
    lines = gpu["numbers_tables"](here, there, "Numbers").splitlines()
    assert "| rloo | failed: ValueError: a / b |  |" in lines
    assert "| ppo, with a critic | equal up to rounding | 1 of 1 |" in lines
    assert lines[-1] == "3 of 3 metrics do not differ at all."
    full = {"seconds": [9.0, 2.0], "sampling": [9.0, 0.5], "tokens": [64, 64], "peak_mb": 1234.5}
    theirs, memory = full | {"seconds": [9.0, 4.0], "sampling": []}, {"error": "out of memory"}
    row = gpu["speed_row"]
    numbers = ["2.000", "0.500", "32", "1,234"]
    assert row("a", full, theirs, 2) == ["a", *numbers, "4.000", "16", "1,234", "2.00"]
    assert row("a", full, memory, 2) == ["a", *numbers, "out of memory", "", "", ""]
    assert row("a", memory, theirs, 2) == [
        "a",
        "out of memory",
        "",
        "",
        "",
        "4.000",
        "16",
        "1,234",
        "",
    ]
    reason = gpu["reason"]
    assert (
        reason("torch.OutOfMemoryError: CUDA out of memory. Tried to\nmore", 1) == "out of memory"
    )
    assert reason("x\ntorch.AcceleratorError: CUDA error: y\nFor debugging, z\n", 1).endswith(
        "error: y"
    )
    assert reason("", -9) == "ended by signal 9, perhaps for want of memory"
    assert gpu["Budget"](time.monotonic() + 1).run("late", {})["error"].startswith("left out")


def printed_by(program, *arguments, folder):
    """The JSON in the last line that a program prints."""
    command = [sys.executable, str(FOLDER / program), *arguments]
    options = {"env": os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, "timeout": 250}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("who", ["tokenrl", "trl"])
@pytest.mark.parametrize(("target", "last"), [(0.0, 15), (2.0, 25)])
def test_a_racer_stops_at_the_target_or_at_the_end(who, target, last, tmp_path, monkeypatch):
    pytest.importorskip(who)
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    task = load_task("sort_digits")
    task.build(0)[0].save_pretrained(tmp_path / "model")
    task.build(0)[1].save_pretrained(tmp_path / "model")
    spec = {"who": who, "task": "sort_digits", "model": str(tmp_path / "model"), "target": target}
    spec |= {"prompts": 4, "steps": 26, "seed": 1, "started": time.time()}
    points = printed_by("one_race.py", json.dumps(spec), folder=tmp_path)["history"]
    assert [step for step, _, _ in points] == list(range(0, last + 1, 5))
    assert all(0 < seconds < 120 and 0 <= reward <= 1 for _, seconds, reward in points)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["tokenrl", "trl"])
@pytest.mark.parametrize("changed", [{}, {"chat": True, "prompt": 20, "lora_r": 2}, {"ends": 6}])
def test_a_measurement(who, changed, tmp_path):
    pytest.importorskip(who)
    request = {"who": who, "shape": TINY | changed, "steps": 3, "estimator": "rloo"}
    measurement = printed_by("one_trainer.py", json.dumps(request), folder=tmp_path)
    assert len(measurement["seconds"]) == 3 and measurement["peak_mb"] > 50
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in measurement["seconds"])
    assert "ends" in changed or measurement["tokens"] == [32] * 4
    if who == "tokenrl":
        # attention with half the keys and values; feed-forward; norms; embedding and head
        assert measurement["parameters"] == 16 * 16 * 3 + 3 * 16 * 16 + 3 * 16 + 2 * 16 * 96


@pytest.mark.slow
def test_the_program_for_a_gpu_finds_a_cpu_equal_to_itself(tmp_path):
    command = [
        sys.executable,
        str(FOLDER / "on_your_gpu.py"),
        "--cpu",
        "--tiny",
        "--output",
        "table.md",
    ]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, env=settings, cwd=tmp_path, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == (tmp_path / "table.md").read_text().strip()
    cells = [
        line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")
    ]
    table = {row[0]: row[1:] for row in cells}
    for name in ("rloo", "grpo, KL in the loss", "ppo, with a critic"):
        assert table[name] == ["equal up to rounding", "2 of 2"]
    assert "38 of 38 metrics do not differ at all." in done.stdout
    assert (
        table["float32 again"] == ["0.0e+00", "0.0e+00"]
        and table["TF32"][0] == "there is none here"
    )
    mean, most = map(float, table["bfloat16"])
    assert 0 < mean < most < 0.2
    seconds, sampling, rate, peak = (float(cell.replace(",", "")) for cell in table["tiny"][:4])
    assert (
        0 < sampling < seconds
        and rate == pytest.approx(2 * 4 * 4 / seconds, rel=0.05)
        and peak > 50
    )


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
    request = json.dumps({"who": "trl", "shape": TINY, "steps": 2})
    assert printed_by("one_trainer.py", request, folder=tmp_path) == {
        "tokenrl": False,
        "spin": None,
    }
    parts = {"one_trainer.py": {"who": "tokenrl", "shape": TINY, "steps": 2}}
    parts["gpu_parts.py"] = {"part": "train_estimators", "steps": 1, "tiny": True, "cpu": True}
    for name, request in parts.items():
        command = [sys.executable, "-X", "importtime", str(FOLDER / name), json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=250)
        order = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
        assert order.index("tokenrl") < order.index("torch"), name
