"""Loads what a reward model is trained from: pairs from a file or from a task, and the backbone.

The backbone of a causal language model is kept and gets a head of one number. The reward is read at the last
token that is not padding, so the tokenizer needs a pad token; if it has none, its EOS token is used, as in
TRL. Adapters (LoRA) are not supported: merge them into the model first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tokenrl.errors import Refused
from tokenrl.language.policy.arguments import ModelArguments
from tokenrl.language.policy.copies import uncompiled
from tokenrl.language.policy.model import Policy
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.preferences.pairs import Pair, load_pairs, read_pairs
from tokenrl.language.preferences.sampled import make_preferences
from tokenrl.language.rewards.model import RewardModel, load_classifier
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.base import load_base, warm_started_base
from tokenrl.language.supervised.defaults import completion_limit
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import find_task, own_task
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import check_seed

HELD_OUT_SEED = 2**32
"""Added to the seed, so that held-out and training pairs use different random numbers."""


@dataclass(frozen=True)
class RewardData:
    """Pairs to train on and to evaluate on.

    Attributes:
        name: name of the data, for people.
        train: the pairs to train on.
        held_out: the pairs to evaluate on. Pairs of one prompt are not divided, but a split may repeat prompts.
        task: the task that the pairs were made from, or whose base model is the backbone; None for neither.
        rows: the rows to save in the run directory, by file name; empty if the data was given.
        divided: how the pairs to evaluate on were held out of those given, in words; else empty.
    """

    name: str
    train: list[Pair]
    held_out: list[Pair]
    task: Any = None
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    divided: str = ""


def load_reward_data(args: RewardModelArguments, announce: Callable[[str], None]) -> RewardData:
    """Read the pairs that the arguments name, or make them from the task.

    Args:
        args: the settings.
        announce: prints a line for people, before and after long work.

    Raises:
        Refused: neither data nor a task is named, or it cannot be used.
    """
    if args.data is None and args.task is None:
        raise Refused(
            "Name the preferences to learn from: data (--data) with the columns prompt, chosen and rejected, or "
            "task (--task), to make them from its policy and reward."
        )
    data = args.data
    task: Any = None
    rewards = None
    if args.task is not None:
        task = own_task(args.task)
        if task is None and data is None and not args.reward:
            data = args.task  # rows without a reward can only be preferences
        else:
            task, rewards = find_task(TaskArguments(task=task or args.task, reward=args.reward))
    if data is not None:
        name = data if isinstance(data, str) else "data in memory"
        train, held_out, words = load_pairs(
            data,
            split=args.split,
            eval_split=args.eval_split,
            eval_size=args.eval_size,
            announce=announce,
        )
        return RewardData(name, train, held_out, task, divided=words)
    return _from_task(args, task, rewards, announce)


def _from_task(
    args: RewardModelArguments, task: Any, rewards: Any, announce: Callable[[str], None]
) -> RewardData:
    model = args.policy
    if model is None and not task.base:
        model = args.model
    arguments = ModelArguments(model=model, base_seed=args.base_seed, **vars(args.form))
    policy = load_base(arguments, task, announce)
    length = args.max_completion_length or completion_limit(task, model, policy)[0]

    def sampled(prompts: Sequence[Any], pairs: int, seed: int) -> list[dict[str, Any]]:
        per_prompt = math.ceil(pairs / len(prompts))
        return make_preferences(
            policy,
            prompts[: math.ceil(pairs / per_prompt)],
            rewards,
            Sampling(length, 2 * per_prompt, seed, temperature=args.temperature),
            noise_temperature=args.noise_temperature,
        )

    with using_threads(choose_threads(policy.size, args.threads)[0]):
        train = sampled(task.train_prompts, args.num_pairs, args.seed)
        held_out = sampled(task.eval_prompts, args.eval_size, HELD_OUT_SEED + args.seed)
    announce(
        f"{len(train):,} preferences from {args.num_pairs:,} sampled pairs; the others are ties."
    )
    return RewardData(
        name=task.name,
        train=read_pairs(train, "preferences.jsonl"),
        held_out=read_pairs(held_out, "preferences_eval.jsonl"),
        task=task,
        rows={"preferences.jsonl": train, "preferences_eval.jsonl": held_out},
    )


def make_backbone(
    args: RewardModelArguments, task: Any, announce: Callable[[str], None]
) -> RewardModel:
    """Make a reward model from the model that the arguments name, or else from the task's tiny model.

    Raises:
        Refused: there is no model, or it cannot be used.
    """
    if args.model is not None:
        return reward_backbone(args.model, seed=args.seed)
    if task is None:
        raise Refused(
            "Name a model to start from: model (--model), a directory or hub name, or a toy task (--task) for its own."
        )
    base = warm_started_base(task, seed=args.base_seed, announce=announce)
    return reward_backbone(str(base), seed=args.seed)


def reward_backbone(source: Any, *, seed: int = 0) -> RewardModel:
    """Make a trainable reward model.

    If the source has no head, a new head is drawn from N(0, 1 / (hidden + 1)) (Stiennon et al. 2020, arXiv
    2009.01325). Rewards then start near 0 and the predicted probabilities near 1/2.

    Args:
        source: a directory or hub name of a causal language model or of a classifier with one label; a
            `Policy`; or a pair of such a model and its tokenizer. The directory of a run means the model that
            it saved. A causal language model in memory is copied; a classifier in memory is used itself.
        seed: seed of a new head.

    Raises:
        Refused: the source cannot be loaded, has another number of labels or an adapter, or lacks weights of
            the backbone. Also if its tokenizer has neither a pad nor an EOS token.
    """
    check_seed(seed)
    if isinstance(source, Policy):
        source = (source.model, source.tokenizer)
    missing: list[str] = []
    if isinstance(source, tuple):
        model, tokenizer = uncompiled(source[0]), source[1]
        if not type(model).__name__.endswith("ForSequenceClassification"):
            model, missing = _from_language_model(model)
    else:
        model, tokenizer, missing = load_classifier(str(source), dtype=torch.float32)
    inside = [name for name in missing if name.startswith(f"{model.base_model_prefix}.")]
    if inside:
        raise Refused(
            f"{source!s:.100} is not a whole model: it lacks {', '.join(inside[:3])}. Save it whole."
        )
    _draw(model, missing, seed)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise Refused(
            f"The tokenizer of {source!s:.100} has no pad and no EOS token; set tokenizer.pad_token."
        )
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return RewardModel((model.requires_grad_(True), tokenizer))


def _from_language_model(model: Any) -> tuple[Any, list[str]]:
    """Return a classifier with a copy of the model's backbone, and the names of its new weights."""
    from transformers import AutoModelForSequenceClassification

    if hasattr(model, "disable_adapter"):
        raise Refused(
            "The model has an adapter: merge it first (merge_and_unload), or give a saved model."
        )
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    prefix = f"{classifier.base_model_prefix}."
    head = [name for name, _ in classifier.named_parameters() if not name.startswith(prefix)]
    return classifier.to(model.device, model.dtype), head


@torch.no_grad()
def _draw(model: nn.Module, names: Sequence[str], seed: int) -> None:
    """Draw the weights of a new head, and set its biases to 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name not in names:
            continue
        weight.zero_()
        if weight.ndim > 1:
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn / (weight.shape[-1] + 1) ** 0.5)
