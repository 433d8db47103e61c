"""Teaches a model the form of a task's answers before it is rewarded (`tokenrl train --warm-start`).

A model that never writes anything like an answer gets equal rewards, from which nothing can be learnt. A warm
start is a run of `tokenrl sft` with all weights, before an adapter is added, in the folder warm_start of the
training's directory; the training begins with its model. The main process alone makes it, and the training has
no more than its directory by then: it opens its own run later. Its learning rate is constant after the warm-up, so
the weights after an update do not depend on the number of updates, and a longer warm start continues a shorter one.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.core.rows import zero_spread
from tokenrl.errors import Interrupted, Refused, read_file
from tokenrl.language.policy.arguments import trained_prompts
from tokenrl.language.policy.loading import find_model
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.saving import read_weights
from tokenrl.language.rewards.calls import TrainerState
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import checked_generator
from tokenrl.language.rollout.rewarded import sample_and_reward
from tokenrl.language.rollout.rollout import cat
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.supervised.base import with_own_weights
from tokenrl.language.supervised.defaults import demonstrations
from tokenrl.language.supervised.sft import sft
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import PromptTask
from tokenrl.runs.signals import SIGNALS
from tokenrl.settings import part_of

SETTINGS: dict[str, Any] = {
    "batch_size": 16,
    "lr_scheduler_type": "constant",
    "warmup_steps": 10,
    "eval_every": 0,
    "save_every": 50,
    "keep_checkpoints": 1,
}
"""The settings of `tokenrl sft` that every warm start has."""
SHARED = (
    "allowed",
    "seed",
    "quiet",
    "cpu",
    "threads",
    "save_minutes",
    "training_attention",
    "micro_batch_size",
    "tokens_per_pass",
    "pass_overhead",
    "mixed_precision",
)
"""Those that it has from the training."""
SKIPPED: dict[str, Any] = {
    "updates": 0,
    "in_words": "skipped by the rule of auto, since at least half of the groups already have unequal rewards; "
    "--warm-start without auto always runs",
}
"""The facts of a warm start that auto skips."""
PROMPTS = 32
"""Training prompts on which auto measures what the policy can do already."""
ENOUGH = 0.5
"""The share of groups with unequal rewards, and of completions with an end, with which auto skips it."""


def warm_start(
    args: Any,
    task: PromptTask,
    rewards: Rewards,
    folder: Path,
    policy: Policy,
) -> dict[str, Any]:
    """Fine-tune a policy on the task's demonstrations; a run that was killed in the folder continues.

    A run that has ended there is taken as it is, unless it is to be overwritten. A check makes none.

    Args:
        args: the settings of the training.
        task: the task, with demonstrations.
        rewards: the rewards, by which auto decides.
        folder: the run directory.
        policy: the policy, without an adapter; one that was loaded by name is trained itself.

    Returns:
        The facts of the warm start, see `facts_of`; with 0 updates if auto skips it, none if there is none.

    Raises:
        Refused: there are no demonstrations, the policy has an adapter, or the folder holds another run.
        Stopped: the loss became NaN or infinite.
        Interrupted: a signal ended the warm start, after it had been saved.
    """
    facts = facts_of(folder)
    if facts.get("updates") != args.warm_start_steps or (args.overwrite and not args.check):
        facts = {}
    if facts or args.check:
        return facts
    if args.resume and not folder.exists():
        with suppress(Refused):
            recorded = read_config(folder.parent).get("warm_started") or {}
            if recorded.get("updates") == 0:
                return SKIPPED
    if args.warm_start == "auto" and is_ready(args, policy, task, rewards):
        return SKIPPED
    if policy.has_adapter:
        raise Refused(
            "warm_start trains all weights, but the model has an adapter: merge it first."
        )
    rows = {"demonstrations": demonstrations(task), "environment": task.environment}
    ended = sft(
        task=PromptTask(task.name, task.train_prompts, (), **rows),
        model=replace(with_own_weights(policy, args.model), reference=None),
        output_dir=str(folder),
        max_steps=args.warm_start_steps,
        overwrite=args.overwrite,
        resume=None if args.overwrite else "auto",
        **SETTINGS,
        **{name: getattr(args, name) for name in SHARED},
    )
    if ended.exit_code:
        raise Interrupted(
            f"{SIGNALS[ended.exit_code]} in the warm start, of which {ended.steps} updates are saved: the same "
            f"command with --output-dir {folder.parent} --resume auto continues it.",
            ended.exit_code,
        )
    return facts_of(folder)


def is_ready(args: Any, policy: Policy, task: PromptTask, rewards: Rewards) -> bool:
    """Return whether auto skips the warm start: enough groups have unequal rewards, and completions an end."""
    rewards.state = TrainerState(max_steps=args.max_steps)
    size = max(2, args.num_generations)
    sampling = replace(part_of(args, Sampling), num_generations=size)
    count = min(PROMPTS, len(task.train_prompts))
    prompts = [row for _, row in PromptStream(task.train_prompts, args.seed).draw_prompts(count)]
    generator = checked_generator(policy, rewards.environments)
    rows = cat([*sample_and_reward(policy, generator, prompts, rewards, sampling, stream="probe")])
    is_equal = zero_spread(rows.rewards, size, rows.valid)
    shares = [float(x.double().mean()) for x in (~is_equal, ~rows.truncated)]
    return min(shares) >= ENOUGH


def start_from(policy: Policy, folder: Path) -> None:
    """Give the policy from which a warm start began the weights with which it ended, and what they have learnt.

    Raises:
        Refused: the weights cannot be read.
    """
    read_weights(policy.model, folder / "model")
    policy.trained_prompts |= trained_prompts(folder / "model")
    setattr(policy.model, "name_or_path", str(folder / "model"))  # noqa: B010  # an adapter names its base


def facts_of(folder: Path) -> dict[str, Any]:
    """Return the facts of a warm start that has ended, for config.json and summary.json.

    Returns:
        `updates`, the loss of the first and of the last update in nats per token, the time that its chat
        template read, if it read any, and a sentence, `in_words`. Nothing where none has ended, or its model is
        damaged.
    """
    with suppress(Refused, OSError, ValueError, LookupError, TypeError):
        summary = json.loads(read_file(folder / "summary.json"))
        find_model(folder / "model")
        facts = {name: summary[name] for name in ("loss_before", "loss_after")}
        facts |= {"updates": summary["steps"], "chat_time": read_config(folder).get("chat_time")}
        sentence = "{updates} updates, loss {loss_before:.3g} -> {loss_after:.3g} nats per token"
        if summary["exit_reason"] == "finished":
            return facts | {"in_words": sentence.format_map(facts)}
    return {}
