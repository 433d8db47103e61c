"""Kills runs at random moments, continues them, and compares them with a run that was not killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet

HERE = Path(__file__).parent


class Nursery:
    """A process that has imported everything, and forks one process for each command line."""

    def __init__(self, folder: Path):
        self.log = folder / "log.txt"
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TOKENRL_CACHE": str(folder / "cache"),
        }
        command = [sys.executable, str(HERE / "nursery.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, cwd=folder, text=True, **pipes)
        assert self.process.stdout.readline() == "ready\n"

    def run(self, argv: list[str], die_at: tuple[str, int] | None = None) -> tuple[int, dict[str, int]]:
        """Run a command line; return its exit code (-9 if it was killed) and its calls by file."""
        wanted = {"argv": argv, "die_at": die_at, "log": str(self.log)}
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        return answer["code"], answer["calls"]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def left(run: Path) -> dict[str, object]:
    """What a run has left: all that it has computed, without the time that it took."""
    newest = max((run / "checkpoints").iterdir())
    summary = json.loads((run / "summary.json").read_text())
    found = {
        "metrics": (run / "metrics.jsonl").read_bytes(),
        "weights": {path.name: path.read_bytes() for path in (run / "model").rglob("*.safetensors")},
        "moments": (newest / "trainer_state.safetensors").read_bytes(),
        "state": _without_times(json.loads((newest / "trainer_state.json").read_text())),
        "summary": _without_times(summary),
        "steps": [json.loads(line)["step"] for line in (run / "timings.jsonl").read_text().splitlines()],
        "completions": {
            path.name: parquet.read_table(path).to_pylist()
            for path in sorted((run / "completions").glob("*.parquet"))
        },
    }
    return found


def _without_times(value):
    """Leave out times, and the random states of spaces, which nobody seeds and nobody draws from."""
    if not isinstance(value, dict):
        return value
    left_out = ("second", "watch", "_space._np_random")
    return {
        key: _without_times(item) for key, item in value.items() if not any(word in key for word in left_out)
    }


def kill_and_continue(nursery: Nursery, folder: Path, argv: list[str], kills: int, seed: int) -> None:
    """Kill runs, continue them to their end, and compare each with a run that was not killed.

    A moment is a random call of a function in a random file of tokenrl, so that a save, an evaluation and an
    update are hit as often as the rest.
    """
    chance = random.Random(seed)
    whole = folder / "whole"
    code, calls = nursery.run([*argv, "--output-dir", str(whole)])
    assert code == 0, nursery.log.read_text()[-3000:]
    expected = left(whole)
    files, killed, number = sorted(calls), 0, 0
    while killed < kills or code != 0:
        run = folder / f"run{number}"
        file = chance.choice(files)
        moment = (file, chance.randint(1, calls[file])) if killed < kills else None
        code, _ = nursery.run([*argv, "--output-dir", str(run), "--resume", "auto"], moment)
        killed += code == -9
        assert code in (0, -9), nursery.log.read_text()[-3000:]
        if code == 0:
            found, number = left(run), number + 1
            for name in expected:
                assert found[name] == expected[name], f"{name} differs: {nursery.log.read_text()[-3000:]}"
