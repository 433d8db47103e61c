"""What a golden run left behind that the seed decides, and where two runs first differ in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Content = list[str] | dict[str, bytes]
"""Lines of text, or tensors as bytes that begin with their type and shape."""

SUMMARY = ("exit_reason", "steps", "eval_before", "eval_after")
"""What is compared of summary.json; the rest was measured by a clock, or is for people."""


def artifacts(folder: Path) -> dict[str, Content]:
    """Read what is compared of a run: metrics, evaluations, completions, preferences, weights.

    The folder name `model` is left out of the keys, so that weights count as the same file whether a command
    writes them to its output directory or to `model` in it.
    """
    found: dict[str, Content] = {}
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        content = _content(path)
        if content is not None:
            parts = [part for part in path.relative_to(folder).parts if part != "model"]
            found["/".join(parts)] = content
    return found


def _content(path: Path) -> Content | None:
    """Return what is compared of a file, or None if it is not compared."""
    if path.suffix == ".safetensors":
        return dict(_tensors(path))
    if path.name in ("metrics.jsonl", "preferences.jsonl", "preferences_eval.jsonl", "evaluation.json"):
        return path.read_text(encoding="utf-8").splitlines()
    if path.name == "summary.json":
        summary = json.loads(path.read_text(encoding="utf-8"))
        return [json.dumps({name: summary.get(name)}, sort_keys=True) for name in SUMMARY]
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        return [json.dumps(row, sort_keys=True) for row in parquet.read_table(path).to_pylist()]
    return None


def _tensors(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of each tensor, so that 0 and -0 differ and a nan equals itself."""
    import torch
    from safetensors.torch import load_file

    for name, tensor in sorted(load_file(path).items()):
        raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield name, f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + raw


def difference(before: dict[str, Content], after: dict[str, Content]) -> str | None:
    """Say where the second run first differs from the first one, or return None.

    A file or a value that only the second run has is no difference: a change may measure more. Metrics come
    first, because their first line that differs says most about the cause.
    """
    if not before:
        return "the first run left nothing that could be compared"
    for name in sorted(before, key=lambda name: (not name.endswith("metrics.jsonl"), name)):
        content = before[name]
        if name not in after:
            return f"{name} is missing"
        other = after[name]
        if content == other:
            continue
        if isinstance(content, dict) and isinstance(other, dict):
            return f"{name}, tensor {_first_tensor(content, other)}"
        if found := _first_line(list(content), list(other)):
            return f"{name}, {found}"
    return None


def _first_tensor(before: dict[str, bytes], after: dict[str, bytes]) -> str:
    names = sorted({*before, *after})
    return next(name for name in names if before.get(name) != after.get(name))


def _first_line(before: list[str], after: list[str]) -> str | None:
    """Name the first line that differs, and its first value that does if both lines are JSON objects."""
    for number, (old, new) in enumerate(zip(before, after, strict=False), start=1):
        if old != new and (found := _first_value(old, new)):
            return f"line {number}: {found}"
    return None if len(before) == len(after) else f"{len(before)} lines became {len(after)}"


def _first_value(before: str, after: str) -> str | None:
    try:
        old, new = _flat(json.loads(before)), _flat(json.loads(after))
    except ValueError:
        return f"{before[:80]} became {after[:80]}"
    for name in sorted(old):
        if name not in new or repr(old[name]) != repr(new[name]):
            return f"{name} {old[name]!r} became {new.get(name, 'absent')!r}"
    return None if len(new) > len(old) else "the same values are written in another way"


def _flat(value: Any, name: str = "value") -> dict[str, Any]:
    """Turn nested objects into one, with the names of the levels joined by dots."""
    if not isinstance(value, dict):
        return {name: value}
    levels = [_flat(item, key if name == "value" else f"{name}.{key}") for key, item in value.items()]
    return {key: item for level in levels for key, item in level.items()}
