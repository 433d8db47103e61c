"""Policy gradients on language models, with the bias of every estimator declared.

The functions `train`, `sft`, `train_reward_model`, `train_agent` (the command `control`), `evaluate` and
`sample` do the same as the commands. Each name is imported when it is first used, so that `import tokenrl`
does not import torch.
"""

import os
import sys

from tokenrl.names import lazily

__version__ = "0.1.0"
__getattr__, __dir__ = lazily(__name__)

# Threads of OpenMP that wait for each other spin, by default for milliseconds. Where another program takes a
# processor, that is most of the time: let them sleep soon. OpenMP reads the variable when torch is imported.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME"} & {
    *os.environ
}:
    os.environ["GOMP_SPINCOUNT"] = "10000"
