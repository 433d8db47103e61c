"""Policy gradients on language models, with the bias of every estimator declared.

`train`, `sft`, `train_reward_model`, `train_agent`, `evaluate` and `sample` do what the commands of the same
purpose do. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.names import lazily

if TYPE_CHECKING:
    from tokenrl.control.run import ControlResult as ControlResult
    from tokenrl.control.training import train_agent as train_agent
    from tokenrl.core.estimator import Estimator as Estimator
    from tokenrl.errors import Refused as Refused, Stopped as Stopped, TokenrlError as TokenrlError
    from tokenrl.lab.exact.verdict import measure_bias as measure_bias
    from tokenrl.language.inspect import evaluate as evaluate
    from tokenrl.language.inspect.chat import sample as sample
    from tokenrl.language.policy.model import load_policy as load_policy
    from tokenrl.language.preferences.fit import train_reward_model as train_reward_model
    from tokenrl.language.preferences.report import RewardModelResult as RewardModelResult
    from tokenrl.language.rewards.model import RewardModel as RewardModel
    from tokenrl.language.tasks.task import PromptTask as PromptTask
    from tokenrl.language.training import sft as sft
    from tokenrl.language.training.loop import train as train
    from tokenrl.language.training.run import RunResult as RunResult
    from tokenrl.language.training.sft import SftResult as SftResult

__version__ = "0.1.0"
PUBLIC = {
    "tokenrl.control.run": ("ControlResult",),
    "tokenrl.control.training": ("train_agent",),
    "tokenrl.core.estimator": ("Estimator",),
    "tokenrl.errors": ("Refused", "Stopped", "TokenrlError"),
    "tokenrl.lab.exact.verdict": ("measure_bias",),
    "tokenrl.language.inspect.chat": ("sample",),
    "tokenrl.language.inspect.evaluate": ("evaluate",),
    "tokenrl.language.policy.model": ("load_policy",),
    "tokenrl.language.preferences.fit": ("train_reward_model",),
    "tokenrl.language.preferences.report": ("RewardModelResult",),
    "tokenrl.language.rewards.model": ("RewardModel",),
    "tokenrl.language.tasks.task": ("PromptTask",),
    "tokenrl.language.training.loop": ("train",),
    "tokenrl.language.training.run": ("RunResult",),
    "tokenrl.language.training.sft": ("SftResult", "sft"),
}
__getattr__, __dir__ = lazily(__name__, PUBLIC)
