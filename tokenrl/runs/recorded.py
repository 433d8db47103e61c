"""Reads what the files of a run directory say of the run, and refuses files that tokenrl did not write so.

People edit these files, and disks and programs damage them; whoever reads them here gets the types that a
run writes, or one paragraph that says which file to mend.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.errors import Refused
from tokenrl.runs.metrics import read_metrics
from tokenrl.settings import MOST, shown

Rules = Mapping[str, tuple[Callable[[Any], bool], str]]


def _number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _measured(value: Any) -> bool:
    return value in (None, "Infinity", "-Infinity") or _number(value)


def _metrics(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(_measured, value.values())))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _told(value: Any) -> bool:
    return not value or (isinstance(value, dict) and isinstance(value.get("in_words"), str))


_TEXT = (lambda value: isinstance(value, str), "text")
_OPEN_TEXT = (lambda value: value is None or isinstance(value, str), "text or null")
_METRICS = (_metrics, "an object of names and numbers, or null")
_RATE = (lambda value: value is None or _number(value), "a number, or null")
_CONFIG: Rules = {
    "kind": _TEXT,
    "title": _OPEN_TEXT,
    "solved": (_measured, "a number, or null"),
    "command": (lambda value: value is None or isinstance(value, str) or _texts(value), "text, or null"),
    "versions": (lambda value: isinstance(value, dict), "an object"),
}
_SUMMARY: Rules = {
    "exit_reason": _TEXT,
    "error": _TEXT,
    "verdict": _TEXT,
    "flags": (_texts, "a list of texts"),
    "warm_started": (_told, "an object with in_words, or null"),
    "calibration": (lambda value: isinstance(value, list), "a list"),
    **dict.fromkeys(("eval_before", "eval_after"), _METRICS),
    **dict.fromkeys(("steps", "wall_seconds", "loss_before", "loss_after"), _RATE),
    **dict.fromkeys(("tokens_per_second", "env_steps_per_second"), _RATE),
}


def recorded_config(run: Path) -> dict[str, Any]:
    """Read config.json; empty if there is none.

    Raises:
        Refused: it cannot be read, or an entry that is no setting has another type than a run writes.
    """
    path = run / "config.json"
    return _checked(path, read_config(path), _CONFIG) if path.is_file() else {}


def recorded_summary(run: Path) -> dict[str, Any]:
    """Read summary.json; empty if there is none.

    Raises:
        Refused: it cannot be read, or an entry has another type than a run writes.
    """
    path = run / "summary.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            f"{path} is damaged ({error}). Remove it, and the run is shown as one that has not ended."
        ) from error
    return _checked(path, found, _SUMMARY)


def recorded_rows(run: Path) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl, each of which says its step.

    Raises:
        Refused: it cannot be read, the step of a row is no whole number, or a metric is no number.
    """
    path = run / "metrics.jsonl"
    rows = read_metrics(path)
    for place, row in enumerate(rows, start=1):
        step = row.get("step")
        if type(step) is not int or not 0 <= step <= MOST:
            raise Refused(
                f"Row {place} of {path} has the step {shown(step, 40)}; it must be a whole number, as "
                "tokenrl writes it. Remove the row, and the others can be shown."
            )
        for name, value in row.items():
            if not _measured(value):
                raise Refused(
                    f"Row {place} of {path} has {shown(value, 40)} for {shown(name, 40)}; it must be a "
                    "number, or null. Remove the row, and the others can be shown."
                )
        row |= {name: float(value) for name, value in row.items() if isinstance(value, str)}  # infinite
    return rows


def _checked(path: Path, found: dict[str, Any], rules: Rules) -> dict[str, Any]:
    for name, (fits, words) in rules.items():
        if name in found and not fits(found[name]):
            raise Refused(
                f"{path} is damaged: {name} is {shown(found[name], 60)}, and a run writes {words}. Mend or "
                f"remove that entry, and the run can be shown."
            )
    return found
