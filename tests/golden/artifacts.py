"""What a golden run left behind that the seed decides, and where two runs first differ in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Content = list[dict[str, Any]]
"""Rows of values: lines of JSON, rows of a table, or one row of tensors, each a list of numbers."""

SUMMARY = ("exit_reason", "steps", "eval_before", "eval_after")
"""What is compared of summary.json; the rest was measured by a clock, or is for people."""

RELATIVE, ABSOLUTE = 1e-5, 1e-6
LOOSE = ("kl", "clip_ratio", "gradient/", "weight_norm", "grad_norm", "ratio", "sampling/")
"""Beginnings of names that are differences of near numbers, or sums over all weights: 1e-4 for them."""


def artifacts(folder: Path) -> dict[str, Content]:
    """Read what is compared of a run: metrics, evaluations, completions, preferences, final weights.

    The folder name `model` is left out of the keys, so that weights count as the same file whether a command
    writes them to its output directory or to `model` in it. Checkpoints are left out.
    """
    result: dict[str, Content] = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        parts = [part for part in path.relative_to(folder).parts if part != "model"]
        content = None if "checkpoints" in parts else _content(path)
        if content is not None:
            result["/".join(parts)] = content
    return result


def _content(path: Path) -> Content | None:
    """Return what is compared of a file, or None if it is not compared."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return [
            {name: tensor.double().flatten() for name, tensor in sorted(load_file(path).items())}
        ]
    if path.name in (
        "metrics.jsonl",
        "preferences.jsonl",
        "preferences_eval.jsonl",
        "evaluation.json",
    ):
        text = path.read_text(encoding="utf-8")
        return [
            flat(json.loads(line))
            for line in ([text] if path.suffix == ".json" else text.splitlines())
        ]
    if path.name == "summary.json":
        summary = json.loads(path.read_text(encoding="utf-8"))
        return [flat({name: summary.get(name) for name in SUMMARY})]
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return [flat(row) for row in parquet.read_table(path).to_pylist()]
    return None


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Turn nested objects and lists into one mapping, with the names of the levels joined by dots."""
    if isinstance(value, list):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, dict):
        return {name: value}
    levels = [flat(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()]
    return {key: item for level in levels for key, item in level.items()}


def difference(before: dict[str, Content], after: dict[str, Content]) -> str | None:
    """Say where the second run first differs from the first one by more than rounding, or return None.

    A file or a value that only the second run has is no difference: a change may measure more. Metrics come
    first, because their first line that differs says most about the cause.
    """
    if not before:
        return "the first run left nothing that could be compared"
    for name in sorted(before, key=lambda name: (not name.endswith("metrics.jsonl"), name)):
        old, new = before[name], after.get(name)
        if new is None:
            return f"{name} is missing"
        for number, (first, second) in enumerate(zip(old, new, strict=False), start=1):
            for key, value in first.items():
                if key not in second:
                    return f"{name}, line {number}: {key} is missing"
                if not equal(key, value, second[key]):
                    return (
                        f"{name}, line {number}: {key} {brief(value)} became {brief(second[key])}"
                    )
        if len(old) != len(new):
            return f"{name}, {len(old)} lines became {len(new)}"
    return None


def equal(name: str, before: Any, after: Any) -> bool:
    """Compare numbers and tensors within the tolerance of their name, and anything else exactly."""
    import torch

    relative = (
        1e-4 if any(part.startswith(LOOSE) for part in (name, name.split(".")[-1])) else RELATIVE
    )
    if isinstance(before, torch.Tensor):
        same = isinstance(after, torch.Tensor) and before.shape == after.shape
        return same and torch.allclose(after, before, rtol=relative, atol=ABSOLUTE, equal_nan=True)
    numbers = [value for value in (before, after) if isinstance(value, (int, float))]
    if len(numbers) == 2 and not any(isinstance(value, bool) for value in numbers):
        within = abs(before - after) <= ABSOLUTE * (relative / RELATIVE) + relative * abs(before)
        return within or (math.isnan(before) and math.isnan(after)) or before == after
    return bool(before == after)


def brief(value: Any) -> str:
    """Show a value in a few words."""
    return f"a tensor of {len(value)}" if hasattr(value, "numel") else repr(value)[:80]
