"""Measures the noise of the arms at the checkpoints of the reference's first run, once for a comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenrl.errors import TokenrlError, describe
from tokenrl.lab.compare.noise import NOTHING, GradientNoise, measure_noise
from tokenrl.lab.compare.records import Plan, Problem, RunRecord
from tokenrl.lab.compare.statistics.found import Interval
from tokenrl.runs.files import plain, write_json

FILE = "noise.json"
"""What was measured, in the directory of a comparison, so that repeating the command need not repeat it."""
ALL = "all"
"""Label in place of a checkpoint's, where none could be measured; the next time it is tried again."""


def noise_of_runs(
    plan: Plan,
    runs: Mapping[tuple[str, str], Sequence[RunRecord]],
    output_dir: Path,
    announce: Callable[[str], None],
) -> tuple[GradientNoise, ...]:
    """Measure the gradients of all arms at the checkpoints of the reference's first run on each problem.

    What cannot be measured, such as a model without a forward-mode derivative, costs only this part of the
    report: the reason stands in the notes.

    Args:
        plan: the comparison.
        runs: its own runs by problem and arm, by seed.
        output_dir: its directory.
        announce: prints a line for people, since measuring takes a while.
    """
    kept, found = _kept(output_dir / FILE), {}
    for problem in plan.problems:
        first = runs[problem.label, plan.reference][0]
        arms = [{"label": arm.label, "settings": plain(arm.settings)} for arm in plan.arms]
        key = json.dumps([first.run.path, arms])
        if key not in kept:
            kept[key] = _measured(plan, problem, output_dir / first.run.path, announce)
        found[key] = kept[key]
    measured = {key: each for key, each in found.items() if all(one.checkpoint != ALL for one in each)}
    write_json(output_dir / FILE, {key: [asdict(one) for one in each] for key, each in measured.items()})
    return tuple(one for each in found.values() for one in each)


def _measured(
    plan: Plan, problem: Problem, run: Path, announce: Callable[[str], None]
) -> tuple[GradientNoise, ...]:
    checkpoints = checkpoints_of(run)
    if not checkpoints:
        return ()
    announce(f"Measuring the noise of the arms' gradients on {problem.label}.")
    try:
        return measure_noise(problem, plan.arms, checkpoints)
    except Exception as error:  # of many kinds, from models and rewards
        reason = str(error) if isinstance(error, TokenrlError) else describe(error)
        note = f"not measured: {reason}"
        arms = [arm.label for arm in plan.arms]
        return tuple(GradientNoise(problem.label, ALL, arm, NOTHING, NOTHING, note) for arm in arms)


def _kept(path: Path) -> dict[str, tuple[GradientNoise, ...]]:
    """Read what was measured before; nothing if it cannot be read."""
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return {key: tuple(_as_noise(one) for one in each) for key, each in written.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _as_noise(one: Mapping[str, Any]) -> GradientNoise:
    numbers = {
        name: Interval(*(math.nan if number is None else float(number) for number in one[name]))
        for name in ("noise", "cosine")
    }
    return GradientNoise(**{**one, **numbers})


def checkpoints_of(run: str | Path) -> dict[str, Path | None]:
    """Find the weights of a finished run at its beginning, half way and at its end.

    Args:
        run: directory of the run.

    Returns:
        Directories by label. `before training` is None, which stands for the model that the run started
        from. `half way` is there if a checkpoint was kept between a quarter and three quarters of the steps,
        and `end` if the last weights were saved. All is empty if the run has not ended.
    """
    run = Path(run)
    try:
        steps = int(json.loads((run / "summary.json").read_text(encoding="utf-8"))["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    found: dict[str, Path | None] = {"before training": None}
    saved = {int(path.name.removeprefix("step_")): path for path in (run / "checkpoints").glob("step_*")}
    middle = [step for step in saved if steps / 4 <= step <= 3 * steps / 4]
    if middle:
        found["half way"] = saved[min(middle, key=lambda step: abs(step - steps / 2))]
    if steps in saved:
        found["end"] = saved[steps]
    elif (run / "model").is_dir():
        found["end"] = run
    return found
