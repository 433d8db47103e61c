"""Language models as token-level policies: load, sample, reward, train, evaluate, inspect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenrl.names import lazily

if TYPE_CHECKING:
    from tokenrl.language.inspect import best_of_n as best_of_n
    from tokenrl.language.inspect.best_of_n import (
        best_of_n_kl as best_of_n_kl,
        choice_weights as choice_weights,
        kl_bound as kl_bound,
        pool_rewards as pool_rewards,
        sample_pool as sample_pool,
    )
    from tokenrl.language.policy.model import Policy as Policy, load_policy as load_policy, wrap as wrap
    from tokenrl.language.preferences.arguments import (
        RewardModelArguments as RewardModelArguments,
        RewardModelSettings as RewardModelSettings,
    )
    from tokenrl.language.preferences.backbone import reward_backbone as reward_backbone
    from tokenrl.language.preferences.evaluation import (
        encode_pairs as encode_pairs,
        preference_metrics as preference_metrics,
        score_pairs as score_pairs,
    )
    from tokenrl.language.preferences.fit import (
        fit_reward_model as fit_reward_model,
        train_reward_model as train_reward_model,
    )
    from tokenrl.language.preferences.pairs import Pair as Pair, read_pairs as read_pairs
    from tokenrl.language.preferences.report import RewardModelResult as RewardModelResult
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
        Generator as Generator,
        TransformersGenerator as TransformersGenerator,
    )
    from tokenrl.language.rollout.rollout import Rollout as Rollout
    from tokenrl.language.rollout.sampling import Sampling as Sampling
    from tokenrl.language.tasks.sources import read_splits as read_splits
    from tokenrl.language.tasks.task import PromptTask as PromptTask, Task as Task, load_task as load_task
    from tokenrl.language.training.arguments import (
        SftArguments as SftArguments,
        TrainArguments as TrainArguments,
    )
    from tokenrl.language.training.evaluation import (
        Evaluation as Evaluation,
        evaluate_policy as evaluate_policy,
    )
    from tokenrl.language.training.probe import over_prompts as over_prompts
    from tokenrl.language.training.supervised import fit as fit, warm_started_base as warm_started_base

PUBLIC = {
    "tokenrl.language.inspect.best_of_n": (
        "best_of_n",
        "best_of_n_kl",
        "choice_weights",
        "kl_bound",
        "pool_rewards",
        "sample_pool",
    ),
    "tokenrl.language.policy.model": ("Policy", "load_policy", "wrap"),
    "tokenrl.language.preferences.arguments": ("RewardModelArguments", "RewardModelSettings"),
    "tokenrl.language.preferences.backbone": ("reward_backbone",),
    "tokenrl.language.preferences.evaluation": ("encode_pairs", "preference_metrics", "score_pairs"),
    "tokenrl.language.preferences.fit": ("fit_reward_model", "train_reward_model"),
    "tokenrl.language.preferences.pairs": ("Pair", "read_pairs"),
    "tokenrl.language.preferences.report": ("RewardModelResult",),
    "tokenrl.language.preferences.sampled": ("make_preferences", "write_preferences"),
    "tokenrl.language.rewards.model": ("RewardModel",),
    "tokenrl.language.rewards.rewards": ("RewardResult", "Rewards", "load_reward"),
    "tokenrl.language.rollout.generator": ("Generator", "TransformersGenerator"),
    "tokenrl.language.rollout.rollout": ("Rollout",),
    "tokenrl.language.rollout.sampling": ("Sampling",),
    "tokenrl.language.tasks.sources": ("read_splits",),
    "tokenrl.language.tasks.task": ("PromptTask", "Task", "load_task"),
    "tokenrl.language.training.arguments": ("SftArguments", "TrainArguments"),
    "tokenrl.language.training.evaluation": ("Evaluation", "evaluate_policy"),
    "tokenrl.language.training.probe": ("over_prompts",),
    "tokenrl.language.training.supervised": ("fit", "warm_started_base"),
}
__getattr__, __dir__ = lazily(__name__, PUBLIC)
