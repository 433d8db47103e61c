import typing

from tokenrl.control.run import ControlResult as ControlResult
from tokenrl.core.estimator import Estimator as Estimator
from tokenrl.errors import (
    Finished as Finished,
    Refused as Refused,
    Stopped as Stopped,
    TokenrlError as TokenrlError,
)
from tokenrl.lab.exact.verdict import measure_bias as measure_bias
from tokenrl.language.policy.model import load_policy as load_policy
from tokenrl.language.preferences.fit import (
    RewardModelResult as RewardModelResult,
)
from tokenrl.language.rewards.model import RewardModel as RewardModel
from tokenrl.language.supervised.sft import SftResult as SftResult
from tokenrl.language.tasks.task import PromptTask as PromptTask
from tokenrl.language.training.run import RunResult as RunResult

if typing.TYPE_CHECKING:
    from tokenrl.signatures import (
        compare as compare,
        evaluate as evaluate,
        sample as sample,
        sft as sft,
        train as train,
        train_agent as train_agent,
        train_reward_model as train_reward_model,
    )
else:
    from tokenrl.control.training import train_agent as train_agent
    from tokenrl.lab.compare.loop import compare as compare
    from tokenrl.language.commands.evaluate import evaluate as evaluate
    from tokenrl.language.commands.sample import sample as sample
    from tokenrl.language.preferences.fit import train_reward_model as train_reward_model
    from tokenrl.language.supervised.sft import sft as sft
    from tokenrl.language.training.loop import train as train

__version__: str
