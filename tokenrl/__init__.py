"""Policy gradients on language models, with the bias of every estimator declared.

The functions `train`, `sft`, `train_reward_model`, `train_agent` (the command `control`), `evaluate` and
`sample` do the same as the commands. Each name is imported when it is first used, so that `import tokenrl`
does not import torch.
"""

from tokenrl.names import lazily

__version__ = "0.1.0"
__getattr__, __dir__ = lazily(__name__)
