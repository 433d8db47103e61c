"""Small runs of a comparison, and a program that makes them, which tests stop and kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tokenrl.lab.compare.records import PlannedRun

PROGRAM = """
import sys
from pathlib import Path
from grid_of_runs import grid
from tokenrl.errors import TokenrlError
from tokenrl.lab.compare.execution.executing import execute
from tokenrl.runs.console import Console

root, executor, steps = sys.argv[1:]
try:
    ends = execute(grid(int(steps)), Path(root), executor=executor, workers=2, console=Console())
except TokenrlError as error:
    print(error)
    sys.exit(error.exit_code)
sys.exit(any(end.state == "failed" for end in ends.values()))
"""  # on purpose without `if __name__ == "__main__"`, as users write programs


def control(arm: str = "rloo", seed: int = 0, **settings) -> PlannedRun:
    shared = {"env": "bandit", "max_steps": 2, "num_envs": 4, "eval_episodes": 4, "eval_every": 1}
    return planned("control", "bandit", arm, seed, {**shared, **settings})


def language(arm: str = "rloo", seed: int = 0, **settings) -> PlannedRun:
    shared = {"task": "sort_digits", "max_steps": 2, "prompts_per_step": 4, "num_generations": 4}
    shared |= {"eval_size": 8, "eval_every": 5, "save_every": 3, "keep_checkpoints": 1}
    return planned("train", "sort_digits", arm, seed, {**shared, **settings})


def planned(kind, problem, arm, seed, settings) -> PlannedRun:
    settings = {"estimator": {"baseline": arm}, "seed": seed, **settings}
    return PlannedRun(problem, arm, seed, "comparison", kind, f"runs/{problem}/{arm}/seed_{seed}", settings)


def grid(steps: int) -> list[PlannedRun]:
    """Two arms with two seeds on a task, and one run in an environment."""
    runs = [language(arm, seed, max_steps=steps) for seed in (0, 1) for arm in ("rloo", "batch_mean")]
    return [*runs, control(max_steps=steps)]


def start(root: Path, executor: str = "local", steps: int = 4) -> subprocess.Popen:
    """Start the program; its messages go to a file beside `root`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with said(root).open("a") as log:
        command = [sys.executable, "-c", PROGRAM, str(root), executor, str(steps)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def said(root: Path) -> Path:
    return root.with_name(f"{root.name}.txt")


def wait_for_lines(root: Path, count: int, process: subprocess.Popen) -> None:
    """Wait until a run of a task has written so many lines of metrics."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        for path in root.glob("runs/sort_digits/*/*/metrics.jsonl"):
            if path.read_bytes().count(b"\n") >= count:
                return
        time.sleep(0.02)
    raise AssertionError(f"no run has come to line {count}: {said(root).read_text()}")


def found(root: Path) -> dict[str, bytes]:
    """What the runs have computed: their metrics and weights."""
    paths = [*root.glob("runs/*/*/*/metrics.jsonl"), *root.glob("runs/*/*/*/model/*.safetensors")]
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(paths)}
