"""Named points of the space of estimators: their fields, their paper, and where others differ."""

from __future__ import annotations

from tokenrl.core.presets_ppo import PPO
from tokenrl.core.presets_reinforce import REINFORCE, Preset

__all__ = ["PRESETS", "Preset"]

PRESETS: dict[str, Preset] = REINFORCE | PPO
