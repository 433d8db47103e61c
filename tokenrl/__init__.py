"""Policy gradients on language models, with the bias of every estimator declared.

`train`, `sft`, `train_reward_model`, `train_agent`, `evaluate` and `sample` do what the commands of the same
purpose do. Nothing heavy is imported until it is used.
"""

from tokenrl.names import lazily

__version__ = "0.1.0"
__getattr__, __dir__ = lazily(__name__)
