import typing

from tokenrl.language.evaluation import best_of_n as best_of_n
from tokenrl.language.evaluation.best_of_n import (
    best_of_n_kl as best_of_n_kl,
    choice_weights as choice_weights,
    sample_pool as sample_pool,
)
from tokenrl.language.evaluation.estimates import over_prompts as over_prompts
from tokenrl.language.evaluation.evaluation import (
    Evaluation as Evaluation,
    evaluate_policy as evaluate_policy,
)
from tokenrl.language.policy.automata import Automaton as Automaton
from tokenrl.language.policy.model import Policy as Policy, load_policy as load_policy, wrap as wrap
from tokenrl.language.preferences.arguments import RewardModelArguments as RewardModelArguments
from tokenrl.language.preferences.data import reward_backbone as reward_backbone
from tokenrl.language.preferences.evaluation import (
    encode_pairs as encode_pairs,
    preference_metrics as preference_metrics,
    score_pairs as score_pairs,
)
from tokenrl.language.preferences.fit import (
    RewardModelResult as RewardModelResult,
    fit_reward_model as fit_reward_model,
)
from tokenrl.language.preferences.pairs import Pair as Pair, read_pairs as read_pairs
from tokenrl.language.preferences.sampled import (
    make_preferences as make_preferences,
    write_preferences as write_preferences,
)
from tokenrl.language.rewards.model import RewardModel as RewardModel
from tokenrl.language.rewards.rewards import (
    RewardResult as RewardResult,
    Rewards as Rewards,
    load_reward as load_reward,
)
from tokenrl.language.rollout.generator import (
    Abilities as Abilities,
    Generator as Generator,
    TransformersGenerator as TransformersGenerator,
)
from tokenrl.language.rollout.rollout import Rollout as Rollout
from tokenrl.language.rollout.sampling import Sampling as Sampling
from tokenrl.language.rollout.vllm import VllmGenerator as VllmGenerator
from tokenrl.language.supervised.arguments import SftArguments as SftArguments
from tokenrl.language.supervised.base import warm_started_base as warm_started_base
from tokenrl.language.supervised.fit import fit as fit
from tokenrl.language.tasks.sources import read_splits as read_splits
from tokenrl.language.tasks.task import PromptTask as PromptTask
from tokenrl.language.training.arguments import TrainArguments as TrainArguments

if typing.TYPE_CHECKING:
    from tokenrl.signatures import (
        load_task as load_task,
        train_reward_model as train_reward_model,
    )
else:
    from tokenrl.language.preferences.fit import train_reward_model as train_reward_model
    from tokenrl.language.tasks.task import load_task as load_task

"""For other rooms of tokenrl, beside the names above; no promise to users."""

from tokenrl.language.commands.arguments import OpenModelArguments as OpenModelArguments
from tokenrl.language.commands.opening import open_policy as open_policy, open_task as open_task
from tokenrl.language.commands.planned import plan_training as plan_training
from tokenrl.language.commands.samples import Samples as Samples, collect_samples as collect_samples
from tokenrl.language.rollout.distribution import Distribution as Distribution
from tokenrl.language.rollout.scoring import Regime as Regime, score as score
