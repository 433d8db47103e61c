"""tokenrl: policy gradients on language models, with the bias of every estimator declared.

`tokenrl.train`, `sft`, `train_reward_model` and `evaluate` do what the commands of the same names do;
`tokenrl.control.training.train` trains gymnasium agents. Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenrl.core import Estimator
    from tokenrl.core.rules import Refused, Stopped, TokenrlError
    from tokenrl.language.asking import sample
    from tokenrl.language.commands import evaluate, sft
    from tokenrl.language.recording import RunResult
    from tokenrl.language.reward_training import train_reward_model
    from tokenrl.language.training import train

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
    "Refused": "tokenrl.core.rules",
    "Stopped": "tokenrl.core.rules",
    "TokenrlError": "tokenrl.core.rules",
    "RunResult": "tokenrl.language.recording",
    "evaluate": "tokenrl.language.commands",
    "sample": "tokenrl.language.asking",
    "sft": "tokenrl.language.commands",
    "train": "tokenrl.language.training",
    "train_reward_model": "tokenrl.language.reward_training",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tokenrl' has no attribute {name!r}; it has {', '.join(__all__)}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
