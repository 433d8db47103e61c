"""Kills runs at random moments, continues them, and compares them with a run that was not killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as parquet

from tests.states import state_of

HERE = Path(__file__).parent
REWARD = """
def sorted_digits(prompts, completions, **_):
    return [sum(a <= b for a, b in zip(c, c[1:])) / 6 + len(set(c)) / 60 for c in completions]
"""
TRAIN = [
    *("train", "--task", "sort_digits", "--reward", "rewards.py:sorted_digits", "--quiet"),
    *("--max-steps", "9", "--prompts-per-step", "4", "--num-generations", "4", "--eval-size", "8"),
    *("--eval-every", "3", "--save-every", "2", "--log-completions", "2", "--learning-rate", "1e-3"),
]


class Moment(NamedTuple):
    """When a process of a run sends itself a signal: at the `number`-th call in a place.

    Attributes:
        place: a file of tokenrl ("runs/session.py") or a function in it ("runs/session.py:record").
        number: counts the calls in that place, from 1.
        signal: the signal.
        rank: which process.
    """

    place: str
    number: int
    signal: int = signal.SIGKILL
    rank: int = 0


class Nursery:
    """A process that has imported everything, and forks the processes of each run."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log.txt"
        self.environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TOKENRL_CACHE": str(folder / "cache"),
        }
        command = [sys.executable, str(HERE / "nursery.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=self.environment, cwd=folder, text=True, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def run(self, argv: list[str], *moments: Moment) -> int:
        """Run a command line in one process; return its exit code, or minus the signal that killed it."""
        return self.run_all(argv, *moments)[0]["code"]

    def run_all(self, argv: list[str], *moments: Moment, processes: int = 1) -> list[dict]:
        """Run a command line; return of each process its exit `code`, and its `calls` by place."""
        at = [(one.rank, one.place, one.number, one.signal) for one in moments]
        wanted = {"argv": argv, "moments": at, "processes": processes, "log": str(self.log)}
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    @property
    def said(self) -> str:
        """The end of what the runs have printed."""
        return self.log.read_text()[-3000:]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def left(run: Path) -> dict[str, object]:
    """What a run has left: all that it has computed, without the time that it took."""
    newest = max((run / "checkpoints").iterdir())
    summary = json.loads((run / "summary.json").read_text())
    return {
        "metrics": (run / "metrics.jsonl").read_bytes(),
        "weights": {path.name: path.read_bytes() for path in (run / "model").rglob("*.safetensors")},
        "state": state_of(newest),
        "summary": {name: value for name, value in summary.items() if "second" not in name},
        "steps": [json.loads(line)["step"] for line in (run / "timings.jsonl").read_text().splitlines()],
        "completions": {
            path.name: parquet.read_table(path).to_pylist()
            for path in sorted((run / "completions").glob("*.parquet"))
        },
    }


def kill_and_continue(
    nursery: Nursery,
    folder: Path,
    argv: list[str],
    kills: int,
    seed: int,
    *,
    processes: int = 1,
    places: tuple[str, ...] = ("",),
) -> None:
    """Kill runs, continue them to their end, and compare each with a run that was not killed.

    A moment is a random call of a function in a random file of tokenrl, so that a save, an evaluation and an
    update are hit as often as the rest; `places` are the folders whose files are meant. Of several processes
    one is killed, and the others must end too.
    """
    chance = random.Random(seed)
    whole = folder / "whole"
    ended = nursery.run_all([*argv, "--output-dir", str(whole)], processes=processes)
    assert all(one["code"] == 0 for one in ended), nursery.said
    expected = left(whole)
    killed, number, codes = 0, 0, [-9]
    while killed < kills or any(codes):
        run, moments = folder / f"run{number}", []
        if killed < kills:
            rank = chance.randrange(processes)
            calls = ended[rank]["calls"]
            file = chance.choice(
                sorted(name for name in calls if ":" not in name and name.startswith(places))
            )
            moments = [Moment(file, chance.randint(1, calls[file]), rank=rank)]
        found = nursery.run_all(
            [*argv, "--output-dir", str(run), "--resume", "auto"], *moments, processes=processes
        )
        codes = [one["code"] for one in found]
        killed += -9 in codes
        assert -9 in codes or not any(codes), nursery.said
        refused = "tokenrl: Before the first step: Another process" in nursery.said.rpartition("SIGKILL")[2]
        usual = (0, 1, 2, -9, -15) if refused else (0, 1, -9, -15)
        assert all(code in usual for code in codes), (codes, nursery.said)
        if not any(codes):
            equal(left(run), expected, nursery)
            number += 1


def equal(found: dict[str, object], expected: dict[str, object], nursery: Nursery) -> None:
    """Compare what two runs have left."""
    for name in expected:
        assert found[name] == expected[name], f"{name} differs: {nursery.said}"
