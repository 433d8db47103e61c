from tokenrl.core.choices import CHOICES as CHOICES
from tokenrl.core.estimator import Estimator as Estimator
from tokenrl.core.memories import Memory as Memory, RunningMean as RunningMean
from tokenrl.core.presets import PRESETS as PRESETS, Preset as Preset
from tokenrl.core.rows import Advantages as Advantages, completion_mask as completion_mask
