"""The mathematics: estimators, their parts, and what each does to the gradient. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.names import lazily

if TYPE_CHECKING:
    from tokenrl.core.baselines import RunningMean as RunningMean
    from tokenrl.core.choices import CHOICES as CHOICES
    from tokenrl.core.estimator import Advantages as Advantages, Estimator as Estimator
    from tokenrl.core.kl import PER_TOKEN as PER_TOKEN
    from tokenrl.core.masking import completion_mask as completion_mask
    from tokenrl.core.presets import PRESETS as PRESETS, Preset as Preset

PUBLIC = {
    "tokenrl.core.baselines": ("RunningMean",),
    "tokenrl.core.choices": ("CHOICES",),
    "tokenrl.core.estimator": ("Advantages", "Estimator"),
    "tokenrl.core.kl": ("PER_TOKEN",),
    "tokenrl.core.masking": ("completion_mask",),
    "tokenrl.core.presets": ("PRESETS", "Preset"),
}
__getattr__, __dir__ = lazily(__name__, PUBLIC)
