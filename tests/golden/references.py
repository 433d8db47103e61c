"""The committed references of the golden runs: their first steps in a form that another processor can repeat.

    python tests/golden/references.py [NAME ...]

runs them with the working tree and writes `files/NAME.jsonl` again. Do so only for a change that is meant to
move numbers, in a commit that says which and why.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from golden_runs import HERE, ROOT, RUNS, execute

FILES = HERE / "files"
STEPS = 3
RELATIVE, ABSOLUTE = 1e-4, 1e-6

Row = dict[str, Any]


def rows_of(name: str, folder: Path) -> list[Row]:
    """Return what a reference holds of a finished run: metrics up to step 3, or a digest of the weights."""
    if RUNS[name].weights:
        return weight_rows(folder / "run")
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["step"] <= STEPS]


def weight_rows(folder: Path) -> list[Row]:
    """Return, for each tensor of the model, its norm and its product with a fixed vector of random signs."""
    import torch
    from safetensors.torch import load_file

    places = (folder / "model" / "model.safetensors", folder / "model.safetensors")
    file = next(path for path in places if path.exists())
    rows = []
    for name, tensor in sorted(load_file(file).items()):
        values = tensor.double().flatten()
        signs = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        rows.append(
            {"tensor": name, "norm": values.norm().item(), "product": (values @ signs.double()).item()}
        )
    return rows


def rounded(row: Row) -> Row:
    """Return a row with eight significant digits, which is far below the tolerance."""
    return {key: float(f"{x:.8g}") if isinstance(x, float) else x for key, x in row.items()}


def read(name: str) -> list[Row]:
    """Return the committed reference of a run."""
    return [json.loads(line) for line in (FILES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def deviations(expected: list[Row], found: list[Row]) -> list[str]:
    """Say which numbers of a reference a run does not repeat; columns that are new are not looked at."""
    out = [] if len(expected) == len(found) else [f"{len(found)} rows instead of {len(expected)}"]
    for number, (old, new) in enumerate(zip(expected, found, strict=False)):
        for key, value in old.items():
            if key not in new:
                out.append(f"row {number}: {key} is missing")
            elif not close(value, new[key]):
                out.append(f"row {number}: {key} is {new[key]!r} instead of {value!r}")
    return out


def close(expected: Any, found: Any) -> bool:
    """Compare numbers within the tolerance, and anything else exactly."""
    if isinstance(expected, (int, float)) and isinstance(found, (int, float)):
        return math.isclose(expected, found, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    return bool(expected == found)


def main(names: list[str]) -> None:
    """Write the references again, of all runs unless some are named."""
    FILES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or RUNS:
            folder = Path(scratch) / name
            execute(name, ROOT, folder, Path(scratch) / "models")
            lines = [json.dumps(rounded(row)) + "\n" for row in rows_of(name, folder)]
            (FILES / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
            print(f"{name}: {len(lines)} rows")


if __name__ == "__main__":
    main(sys.argv[1:])
