"""All runs on a device other than the CPU, gives the CPU's numbers, and seldom waits for the device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch.utils.backend_registration as registration

if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this release of torch has no backends in Python", allow_module_level=True)

from on_device import COMMANDS, NAMES, RUNS

PROGRAM = Path(__file__).with_name("on_device.py")
QUICK = ["padded"]


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A function that returns what the program gave for a name; each group runs once."""

    @cache
    def group(is_quick: bool) -> tuple[dict[str, Any], str]:
        names = QUICK if is_quick else [name for name in NAMES if name not in QUICK]
        command = [sys.executable, str(PROGRAM), str(tmp_path_factory.mktemp("runs")), *names]
        options = {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "timeout": 1500}
        process = subprocess.run(command, capture_output=True, text=True, **options)
        lines = [line for line in process.stdout.splitlines() if line.startswith("{")]
        return {row["name"]: row for row in map(json.loads, lines)}, process.stderr[-3000:]

    def of(name: str) -> dict[str, Any]:
        rows, errors = group(name in QUICK)
        assert name in rows, errors
        return rows[name]

    return of


def cases(names: list[str]) -> list[Any]:
    """All but the quick ones are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names]


def assert_close(expected: dict[str, Any], actual: dict[str, Any], where: str) -> None:
    assert expected.keys() == actual.keys(), where
    for name, value in expected.items():
        if isinstance(value, float):
            tolerance = {"rel": 2e-3, "abs": 2e-4}
            if name == "loss" and where.startswith("bfloat16"):
                tolerance["rel"] = 4e-3  # two numbers that are each rounded by up to 2**-9
            if "logp_difference" in name:  # it is rounding and nothing else
                tolerance = {"rel": 0, "abs": 5e-3 if where.startswith("bfloat16") else 1e-4}
            value = pytest.approx(value, nan_ok=True, **tolerance)
        assert actual[name] == value, f"{where} {name}"


@pytest.mark.parametrize("name", cases(NAMES))
def test_a_device_gives_the_numbers_of_the_cpu(results, name):
    result = results(name)
    for where in ("cpu", "device"):
        assert "error" not in result[where], f"{where}: {result[where]['error']}"
    expected, actual = result["cpu"]["rows"], result["device"]["rows"]
    assert len(expected) == len(actual) and (expected or name == "check")
    for number, (row, other) in enumerate(zip(expected, actual, strict=True)):
        assert_close(row, other, f"{name}, row {number}")


@pytest.mark.parametrize("name", cases([name for name in RUNS if name not in COMMANDS]))
def test_a_step_waits_at_most_ten_times_and_once_for_eight_tokens(results, name):
    if name == "check":
        pytest.skip("it has no step of its own")
    waits = results(name)["device"]["waits"]
    sampling = {line: n for line, n in waits.items() if "rollout/decoding.py" in line}
    rest = {line: n for line, n in waits.items() if line not in sampling}
    # turns of episodes
    calls = 1 if RUNS[name].get("task") not in ("guess_number", "calculator") else 10
    calls = 3 if name in ("dapo", "remax") else calls
    length = RUNS[name].get("max_completion_length", 8)
    looks = 2 if name == "stop strings" else 1  # of each, one is for the texts
    assert sum(sampling.values()) <= looks * calls * max(1, math.ceil(length / 8)), sampling
    assert sum(rest.values()) <= 10, rest
    assert sampling, "a step reads what was sampled"
