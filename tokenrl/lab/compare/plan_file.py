"""Writes the plan of a comparison before it starts, and says what an older plan there allows."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused
from tokenrl.lab.compare.records import Plan
from tokenrl.runs.files import plain, write_json

JUDGED = {"reference": "the reference", "metric": "the metric that decides", "margins": "the margin"}
"""Fields that decide how runs are judged, and not which runs there are."""


def settle_plan(plan: Plan, output_dir: Path, *, overwrite: bool) -> Plan:
    """Compare a plan with the one that the directory holds; return it with what has changed since.

    More seeds, more arms, and another way to judge are allowed. If runs of the older plan have begun, they
    are noted, and added arms are marked as exploratory: who looks at results before choosing what to compare,
    or when to stop, will find differences by chance more often than the level says.

    Args:
        plan: the plan.
        output_dir: the directory of the comparison.
        overwrite: remove the comparison that the directory holds.

    Raises:
        Refused: the directory holds a comparison of other problems, arms or seeds, or something else.
    """
    path = output_dir / "plan.json"
    if not os.path.exists(path):
        if os.path.isdir(output_dir) and any(output_dir.iterdir()):
            raise Refused(
                f"{output_dir} holds files, but no comparison. Give a new or an empty --output-dir."
            )
        return plan
    if overwrite:
        shutil.rmtree(output_dir)
        return plan
    try:
        old = json.loads(path.read_text(encoding="utf-8"))["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"{path} cannot be read ({error}). Give another --output-dir, or replace it with --overwrite."
        ) from error
    changes = _changes(old, plain(asdict(plan)), output_dir)
    if not any((output_dir / "runs").rglob("config.json")):
        return plan
    known = {arm["label"] for arm in old["arms"] if not arm.get("exploratory")}
    arms = tuple(replace(arm, exploratory=arm.label not in known) for arm in plan.arms)
    return replace(plan, arms=arms, changes=tuple(dict.fromkeys([*old.get("changes", ()), *changes])))


def write_plan(plan: Plan, output_dir: Path, expected: Mapping[str, Any]) -> None:
    """Write plan.json: the plan, and what may be expected of it."""
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "plan.json", {"plan": asdict(plan), "expected": dict(expected)})


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], output_dir: Path) -> list[str]:
    """Return in words how a plan differs from the older one.

    Raises:
        Refused: it differs in more than it may.
    """
    wrong, changes = [], []
    for name in ("problems", "tuning_seeds", "rates"):
        if old.get(name) != new[name]:
            wrong.append(_differing(name, old.get(name), new[name]))
    before, now = ({arm["label"]: arm["settings"] for arm in p.get("arms", ())} for p in (old, new))
    for label, settings in before.items():
        if now.get(label) != settings:
            wrong.append(f"the arm {label!r}: {'was there' if label not in now else 'had other settings'}")
    added = [label for label in now if label not in before]
    if added:
        changes.append(f"the arms {', '.join(added)} were added after runs had begun")
    for name in ("seeds", "itself_seeds"):
        seeds, more = old.get(name, []), new[name]
        if seeds[: len(more)] != more[: len(seeds)]:
            wrong.append(f"{name}: {seeds}, now {more}")
        elif len(more) != len(seeds) and name == "seeds":
            changes.append(f"the number of seeds was changed from {len(seeds)} to {len(more)} on the way")
    for name, words in JUDGED.items():
        if old.get(name) != new[name]:
            changes.append(f"{words} was changed from {old.get(name)} to {new[name]} after runs had begun")
    if wrong:
        raise Refused(
            f"{output_dir} holds another comparison: {'; '.join(wrong)}. Give the arguments that it was "
            "started with (plan.json has its command), another --output-dir, or --overwrite to replace it."
        )
    return changes


def _differing(name: str, old: Any, new: Any) -> str:
    """Say in words how two values of a plan differ; of problems, by the settings that do."""
    if name != "problems" or not isinstance(old, list) or len(old) != len(new):
        return f"{name}: {_short(old, name)}, now {_short(new, name)}"
    parts = []
    for before, now in zip(old, new, strict=True):
        one, other = ({**p, **p["settings"], "settings": None} for p in (before, now))
        names = [n for n in dict.fromkeys([*one, *other]) if one.get(n) != other.get(n)]
        parts += [f"{n}: {one.get(n)}, now {other.get(n)}" for n in names]
    return "; ".join(parts)


def _short(value: Any, name: str) -> str:
    if name == "problems" and isinstance(value, list):
        return ", ".join(str(problem.get("label")) for problem in value)
    return str(value)
