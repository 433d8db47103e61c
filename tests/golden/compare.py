"""Run the golden runs with the code of a commit and of the working tree, and compare them within rounding.

    python tests/golden/compare.py COMMIT [NAME ...]

The table of runs is the working tree's for both. Exit code 1 says that something differs, or that a run failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from golden_runs import RUNS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LOOSE = ("kl", "clip_ratio", "gradient/", "weight_norm", "grad_norm", "ratio", "sampling/")
"""Beginnings of names that are differences of near numbers, or sums over all weights: 1e-4 for them, else 1e-5."""


def artifacts(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of what the seed decides in a run: metrics, evaluations, completions, pairs, weights.

    The folder `model` is left out of the names, as commands have written weights beside it. Checkpoints are left
    out, and what was measured by a clock. Metrics come first, as their first difference says most.
    """
    result = {}
    for path in sorted(folder.rglob("*.*"), key=lambda path: (path.name != "metrics.jsonl", path)):
        if rows := [] if "checkpoints" in path.parts else rows_of(path):
            result[str(path.relative_to(folder)).replace("model/", "")] = rows
    return result


def rows_of(path: Path) -> list[dict[str, Any]]:
    from pyarrow.parquet import read_table
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        return [load_file(path)]
    if path.suffix == ".parquet":
        return read_table(path).to_pylist()
    if path.name == "evaluation.json":
        return [json.loads(path.read_text(encoding="utf-8"))]
    is_log = path.suffix == ".jsonl" and path.name not in ("timings.jsonl", "data.jsonl")
    return list(map(json.loads, path.read_text(encoding="utf-8").splitlines())) if is_log else []


def difference(before: dict[str, list[dict]], after: dict[str, list[dict]]) -> str:
    """Say where the second run first differs from the first one by more than rounding.

    What only the second run has is no difference: a change may measure more.
    """
    if not before:
        return "the first run left nothing that could be compared"
    for name, old in before.items():
        new = after.get(name, [])
        if len(old) != len(new):
            return f"{name}, {len(old)} lines became {len(new)}"
        for number, (first, second) in enumerate(zip(old, new, strict=True), start=1):
            for key, value in first.items():
                if not equal(key, value, second.get(key, "missing")):
                    return f"{name}, line {number}: {key} {str(value)[:80]} became {str(second.get(key))[:80]}"
    return ""


def equal(name: str, before: Any, after: Any) -> bool:
    """Compare numbers and tensors within the tolerance of their name, and anything else exactly."""
    if isinstance(before, list) and isinstance(after, list):
        pairs = zip(before, after, strict=False)
        return len(before) == len(after) and all(equal(name, *pair) for pair in pairs)
    kinds = (int, float, torch.Tensor)
    if not (isinstance(before, kinds) and isinstance(after, kinds)):
        return bool(before == after)
    scale = 10 if name.removeprefix("eval_").startswith(LOOSE) else 1
    old, new = (torch.as_tensor(x, dtype=torch.double) for x in (before, after))
    bounds = {"rtol": 1e-5 * scale, "atol": 1e-6 * scale, "equal_nan": True}
    return old.shape == new.shape and torch.allclose(new, old, **bounds)


def execute(tree: Path, folder: Path, names: list[str]) -> None:
    """Run golden runs with the code of a tree: one thread, no accelerator, no network, a cache of their own."""
    folder.mkdir()
    own = {"PYTHONPATH": str(tree), "TOKENRL_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    own |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "golden_runs.py"), *names]
    subprocess.run(command, cwd=folder, env=os.environ | own, check=True)


def main(commit: str, *names: str) -> int:
    """Compare, print a line for each run, and return the exit code."""
    chosen, different = list(names or RUNS), False
    with tempfile.TemporaryDirectory(prefix="golden-") as place:
        folder = Path(place).resolve()
        (folder / "tree").mkdir()
        files = subprocess.check_output(
            ["git", "archive", commit, "tokenrl", "toy_tasks"], cwd=ROOT
        )
        subprocess.run(["tar", "-x"], cwd=folder / "tree", input=files, check=True)
        execute(folder / "tree", folder / "before", chosen)
        execute(ROOT, folder / "after", chosen)
        for name in chosen:
            text = difference(*(artifacts(folder / side / name) for side in ("before", "after")))
            print(f"{name:22}{text or 'same'}", flush=True)
            different = different or text != ""
    return int(different)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
