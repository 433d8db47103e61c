"""Collects the presets: named estimators with their fields, their paper, and how other toolkits differ."""

from __future__ import annotations

from typing import Any

from tokenrl.core.presets_ppo import PPO
from tokenrl.core.presets_reinforce import REINFORCE, Preset

__all__ = ["PRESETS", "Preset", "preset_name"]

PRESETS: dict[str, Preset] = REINFORCE | PPO


def preset_name(estimator: Any) -> str:
    """Return the name of the preset with exactly these fields, or 'custom estimator'."""
    known = (name for name in PRESETS if type(estimator).preset(name) == estimator)
    return next(known, "custom estimator")
