"""All runs on a device other than the CPU, gives the CPU's numbers, and seldom waits for the device."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.utils.backend_registration as registration

if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip("this release of torch has no backends in Python", allow_module_level=True)

from on_device import COMMANDS, NAMES, RUNS

PROGRAM = Path(__file__).with_name("on_device.py")
QUICK = ["padded"]
TOLERANCE = {"rel_tol": 2e-3, "abs_tol": 2e-4}


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A function that returns what the program gave for a name on a kind of device; each group runs once."""
    done: dict[tuple[str, str], dict[str, Any]] = {}
    errors: dict[tuple[str, str], str] = {}

    def of(kind: str, name: str) -> dict[str, Any]:
        if (kind, name) not in done | errors:
            group = QUICK if name in QUICK else [other for other in NAMES if other not in QUICK]
            folder = str(tmp_path_factory.mktemp(kind))
            variables = os.environ | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, str(PROGRAM), kind, folder, *group]
            process = subprocess.run(
                command, capture_output=True, text=True, env=variables, timeout=1500
            )
            for line in process.stdout.splitlines():
                if line.startswith("{"):
                    result = json.loads(line)
                    done[kind, result["name"]] = result
            errors.update({(kind, other): process.stderr[-3000:] for other in group})
        assert (kind, name) in done, errors[kind, name]
        return done[kind, name]

    return of


def cases(names: list[str]) -> list[Any]:
    """Pairs of a kind and a name; all but the quick ones on a Mac are slow."""
    pairs = [(kind, name) for name in names for kind in ("mps", "cuda")]
    return [
        pytest.param(*pair, marks=() if pair[0] == "mps" and pair[1] in QUICK else pytest.mark.slow)
        for pair in pairs
    ]


def assert_close(expected: Any, actual: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert expected.keys() == actual.keys(), where
        for name in expected:
            assert_close(expected[name], actual[name], f"{where} {name}")
    elif isinstance(expected, float) and not math.isnan(expected):
        tolerance = TOLERANCE
        if "logp_difference" in where:  # it is rounding and nothing else
            tolerance = {"rel_tol": 0, "abs_tol": 5e-3 if where.startswith("bfloat16") else 1e-4}
        assert math.isclose(expected, actual, **tolerance), (
            f"{where}: {expected} on the CPU, {actual}"
        )
    elif not isinstance(expected, float):
        assert expected == actual, where


@pytest.mark.parametrize(("kind", "name"), cases(NAMES))
def test_a_device_gives_the_numbers_of_the_cpu(results, kind, name):
    result = results(kind, name)
    for where in ("cpu", "device"):
        assert "error" not in result[where], f"{where}: {result[where]['error']}"
    expected, actual = result["cpu"]["rows"], result["device"]["rows"]
    assert len(expected) == len(actual) and (expected or name == "check")
    for number, (row, other) in enumerate(zip(expected, actual, strict=True)):
        assert_close(row, other, f"{name}, row {number}")


@pytest.mark.parametrize(("kind", "name"), cases([name for name in RUNS if name not in COMMANDS]))
def test_a_step_waits_at_most_ten_times_and_once_for_eight_tokens(results, kind, name):
    if name == "check":
        pytest.skip("it has no step of its own")
    waits = results(kind, name)["device"]["waits"]
    sampling = {line: n for line, n in waits.items() if "rollout/generator.py" in line}
    rest = {line: n for line, n in waits.items() if line not in sampling}
    # turns of episodes
    calls = 1 if RUNS[name].get("task") not in ("guess_number", "calculator") else 10
    calls = 3 if name in ("dapo", "remax") else calls
    length = RUNS[name].get("max_completion_length", 8)
    looks = 2 if name == "stop strings" else 1  # of each, one is for the texts
    assert sum(sampling.values()) <= looks * calls * max(1, math.ceil(length / 8)), sampling
    assert sum(rest.values()) <= 10, rest
    assert sampling, "a step reads what was sampled"
