"""Reads the arms of a comparison: presets, presets with other axes, baselines of the user."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import combinations
from typing import Any

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, suggest
from tokenrl.lab.compare.plan import Arm
from tokenrl.runs.files import plain
from tokenrl.settings import arguments

AXES = tuple(f.name for f in fields(Estimator))
OWN = ("task", "env", "model", "output_dir", "overwrite", "quiet", "seed", "resume", "check", "threads")
"""Settings of a run that a comparison sets itself."""
SWEPT = ("num_generations", "learning_rate")
"""Settings that a comparison takes itself, several of them at once; an arm may set them all the same."""
MEASURE = (
    *("reward", "reward_weights", "prompt_column", "prompt_template", "split", "eval_split", "eval_size"),
    *("eval_generations", "eval_every", "max_steps", "max_samples", "num_envs", "num_steps", "eval_episodes"),
    "max_episode_steps",
)
"""Settings that decide what is measured, or how often and on how many samples: all arms share them."""


def read_arms(texts: Sequence[str], axes: Mapping[str, Any], settings: Sequence[str]) -> tuple[Arm, ...]:
    """Read all arms of a comparison.

    Args:
        texts: the arms as the user wrote them; see `read_arm`.
        axes: axes of the estimator that all arms share; an arm's own come on top.
        settings: the names of the settings that a run has.

    Raises:
        Refused: an arm cannot be read, two arms are the same, or there are fewer than two.
    """
    arms = [read_arm(text, axes, settings) for text in texts]
    if len(arms) < 2:
        raise Refused(f"arms names {len(arms)} arm; a comparison needs two or more, such as rloo grpo.")
    for arm, other in combinations(arms, 2):
        if arm.label == other.label:
            raise Refused(f"The arm {arm.label!r} is given twice; give each of them once.")
        if arm.settings == other.settings:
            raise Refused(
                f"The arms {arm.label!r} and {other.label!r} have the same settings, so there is nothing to "
                "compare. Leave one out; how far an arm lies from itself is shown anyway."
            )
    return tuple(arms)


def read_arm(text: str, axes: Mapping[str, Any], settings: Sequence[str]) -> Arm:
    """Read one arm, such as `rloo`, `grpo,scale=none`, `baseline=group_mean` or `mine.py:baseline`.

    Args:
        text: a preset or a function, which is a baseline of the user's own; then changes, each NAME=VALUE,
            where a name is that of an axis of the estimator or of another setting of a run. Without a preset
            the axes are those of the default estimator. Commas separate; those in brackets belong to a value.
        axes: axes that all arms share.
        settings: the names of the settings that a run has.

    Raises:
        Refused: there is no such preset, axis or setting, or a value is not allowed.
    """
    preset, *changes = [part.strip() for part in _parts(text)]
    if not preset:
        raise Refused("An arm is empty; name a preset, such as rloo.")
    if "=" in preset:
        preset, changes = "", [preset, *changes]
    axes, own = dict(axes), dict[str, Any]()
    for change in changes:
        name, equals, value = change.partition("=")
        name = name.strip().removeprefix("--").removeprefix("estimator.").replace("-", "_")
        if not equals or not name:
            raise Refused(
                f"The arm {text!r} holds {change!r}; after the preset write changes as NAME=VALUE, such as "
                '"grpo,scale=none".'
            )
        if name not in AXES:
            _check_name(text, name, settings)
        (axes if name in AXES else own)[name] = _value(value.strip())
    try:
        if preset and ":" not in preset:
            estimator = Estimator.preset(preset, **axes)
        else:
            estimator = arguments(Estimator, {**({"baseline": preset} if preset else {}), **axes})
    except Refused as error:
        raise Refused(f"The arm {text!r} cannot be used: {error}") from error
    return Arm(text, {"estimator": changed_axes(estimator), **own}, estimator.bias_status)


def changed_axes(estimator: Estimator) -> dict[str, Any]:
    """Return the axes in which an estimator differs from the default one, as JSON holds them."""
    values, usual = plain(estimator), plain(Estimator())
    return {name: value for name, value in values.items() if value != usual[name]}


def _check_name(text: str, name: str, settings: Sequence[str]) -> None:
    if name in (*OWN, "estimator"):
        why = "which the comparison sets itself; leave it out there."
    elif name in MEASURE:
        why = f"which decides what is measured; set it for all arms: --{name.replace('_', '-')}."
    elif name in settings:
        return
    else:
        why = f"which is no setting.{suggest(name, [*AXES, *settings])}"
    raise Refused(f"The arm {text!r} sets {name}, {why}")


def _parts(text: str) -> list[str]:
    """Split at commas that are in no bracket and in no quotes."""
    return re.findall(r"(?:[^,(\[{\"']|\([^)]*\)|\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*')+", text) or [text]


def _value(text: str) -> Any:
    """Read a number, a tuple, True, False or None as Python writes it; anything else is text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text, text)
