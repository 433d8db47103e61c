"""tokenrl: policy gradients on language models, with the bias of every estimator declared.

`tokenrl.train`, `sft`, `train_reward_model` and `evaluate` do what the commands of the same names do;
`tokenrl.control.training.train` trains gymnasium agents. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.names import lazily

if TYPE_CHECKING:
    from tokenrl.core import Estimator
    from tokenrl.errors import Refused, Stopped, TokenrlError
    from tokenrl.language.inspect.chat import sample
    from tokenrl.language.inspect.evaluate import evaluate
    from tokenrl.language.preferences.fit import train_reward_model
    from tokenrl.language.training.loop import train
    from tokenrl.language.training.run import RunResult
    from tokenrl.language.training.sft import sft

__version__ = "0.1.0"
__all__ = [
    "Estimator",
    "Refused",
    "RunResult",
    "Stopped",
    "TokenrlError",
    "evaluate",
    "sample",
    "sft",
    "train",
    "train_reward_model",
]

_HOMES = {
    "Estimator": "tokenrl.core",
    "Refused": "tokenrl.errors",
    "Stopped": "tokenrl.errors",
    "TokenrlError": "tokenrl.errors",
    "RunResult": "tokenrl.language.training.run",
    "evaluate": "tokenrl.language.inspect.evaluate",
    "sample": "tokenrl.language.inspect.chat",
    "sft": "tokenrl.language.training.sft",
    "train": "tokenrl.language.training.loop",
    "train_reward_model": "tokenrl.language.preferences.fit",
}


__getattr__ = lazily(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
