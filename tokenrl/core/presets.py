"""Named points of the space of estimators: their fields, their paper, and where others differ."""

from __future__ import annotations

from typing import Any

from tokenrl.core.presets_ppo import PPO
from tokenrl.core.presets_reinforce import REINFORCE, Preset

__all__ = ["PRESETS", "Preset", "preset_name"]

PRESETS: dict[str, Preset] = REINFORCE | PPO


def preset_name(estimator: Any) -> str:
    """Name the preset that has exactly the fields of an `Estimator`, or say that it is a custom one."""
    known = (name for name in PRESETS if type(estimator).preset(name) == estimator)
    return next(known, "custom estimator")
