"""Teaches any model the form of a task's answers before it is rewarded: `tokenrl train --warm-start`.

A model that never writes anything like an answer gets equal rewards, from which nothing can be learnt. The
stage trains all weights on the task's demonstrations, before an adapter is added, until enough groups of
sampled completions have unequal rewards. The result is kept in the cache of warm-started bases.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy, load_policy
from tokenrl.language.policy.saving import fingerprint, save_policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.ways import choose_way
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.cache import cache_entry, say_damaged
from tokenrl.language.training.defaults import default_rate, demonstrations, parameter_count
from tokenrl.language.training.probe import Probe, probe_policy
from tokenrl.language.training.supervised import MADE_BY, SupervisedTraining, check_trainable
from tokenrl.runs.checkpoint import replace_directory
from tokenrl.runs.console import Console
from tokenrl.runs.files import write_json
from tokenrl.runs.threads import choose_threads, using_threads

BATCH = 16
"""Demonstrations per update."""
EVERY, PROMPTS = 20, 32
"""Updates between two probes of the sampled reward, and the training prompts of a probe."""
ENOUGH = 0.5
"""The stage ends once this share of groups has unequal rewards, and this share of completions an end."""


def warm_start(
    policy: Policy, task: Any, rewards: Rewards, args: TrainSettings, console: Console, device: torch.device
) -> dict[str, Any]:
    """Train all weights on the task's demonstrations until sampled rewards differ, or take it from the cache.

    Args:
        policy: the policy, without an adapter; it is moved to the device and trained in place.
        task: the task, with demonstrations.
        rewards: the reward functions, for the probes.
        args: the settings of the run: how completions are sampled, the seed, the most updates.
        console: shows the progress.
        device: the device to train on.

    Returns:
        The facts for config.json and summary.json: `updates`, the loss before and after in nats per token,
        the mean sampled reward on training prompts and the share of groups with unequal rewards before and
        after, and `in_words`, a sentence.

    Raises:
        Refused: there are no demonstrations, or one or the model cannot be used.
        Stopped: the loss became NaN or infinite, or a reward function failed.
    """
    if policy.has_adapter:
        raise Refused("warm_start trains all weights, but the model has an adapter: give it merged, or bare.")
    rows = demonstrations(task)
    check_trainable(policy)
    policy.model.to(device)
    choose_way(policy)
    rate, most = default_rate(parameter_count(policy), supervised=True), args.warm_start_steps
    training = SupervisedTraining(
        policy, rows, max_steps=most, batch_size=BATCH, learning_rate=rate, seed=args.seed
    )
    with cache_entry(f"warm-start-{_key(policy, training, rewards, args, rate)}") as directory:
        setattr(policy.model, "name_or_path", str(directory))  # noqa: B010  # an adapter names its base by it
        if directory.exists() and (facts := _cached(directory, policy, args, console)):
            console.note(f"warm start, from the cache: {facts['in_words']}.")
            return facts
        console.note(
            f"warm start: at most {most} updates of all weights on {BATCH} of {len(rows):,} demonstrations,\n"
            f"learning rate {rate:g}, until half of the groups have unequal rewards; kept in {directory}"
        )
        with using_threads(choose_threads(policy.size, args.threads)[0]):
            facts = _train(policy, training, task, rewards, args, console)

        def write(path: Any) -> None:
            save_policy(policy, path)
            write_json(path / "warm_start.json", facts)

        replace_directory(directory, write, sealed=True)
    console.note(f"warm start: {facts['in_words']}.")
    return facts


def _cached(directory: Path, policy: Policy, args: TrainSettings, console: Console) -> dict[str, Any] | None:
    """Load the weights of an entry of the cache, and return its facts; None if the entry is damaged."""
    try:
        facts: dict[str, Any] = json.loads((directory / "warm_start.json").read_text(encoding="utf-8"))
        loaded = load_policy(directory, dtype="auto", trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, Refused) as error:
        say_damaged(directory, error, console.warn)
        return None
    policy.model.load_state_dict(loaded.model.state_dict())
    return facts


def _train(
    policy: Policy,
    training: SupervisedTraining,
    task: Any,
    rewards: Rewards,
    args: TrainSettings,
    console: Console,
) -> dict[str, Any]:
    """Alternate updates and probes until a probe is good enough, or the updates are used up."""
    step, most, losses = 0, args.warm_start_steps, []
    found = before = _probe(policy, task, rewards, args)
    try:
        with console.progress(most) as progress:
            while step < most and not _enough(found):
                step += 1
                shown = training.update()
                losses.append(shown["loss"])
                if step % EVERY == 0 or step == most:
                    found = _probe(policy, task, rewards, args)
                    shown["reward"] = found.reward.value
                progress.update(step, shown)
    except KeyboardInterrupt:
        console.warn(f"interrupted in update {step} of the warm start: nothing of it is kept.")
        raise
    policy.model.zero_grad(set_to_none=True)  # an adapter leaves these weights alone: free their gradients
    if not _enough(found):
        console.warn(
            f"after {step} updates only {_spread(found):.0%} of the groups have unequal rewards, and "
            f"{found.truncated.value:.0%} of the completions are cut: raise warm_start_steps."
        )
    return _facts(before, found, losses)


def _probe(policy: Policy, task: Any, rewards: Rewards, args: TrainSettings) -> Probe:
    """Sample groups for the same training prompts each time."""
    stream = PromptStream(task.train_prompts, min(PROMPTS, len(task.train_prompts)), args.seed)
    sampling = Sampling(
        max_completion_length=args.max_completion_length,
        num_generations=max(2, args.num_generations),
        temperature=args.temperature,
        seed=args.seed,
        truncate_prompts=args.truncate_prompts,
    )
    return probe_policy(policy, [row for _, row in stream.next()], rewards, sampling)


def _spread(found: Probe) -> float:
    """Return the share of groups with unequal rewards, for the largest group size that was measured."""
    return 1 - found.dead_groups[max(found.dead_groups)].value


def _enough(found: Probe) -> bool:
    return _spread(found) >= ENOUGH and found.truncated.value <= 1 - ENOUGH


def _facts(before: Probe, after: Probe, losses: list[float]) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "updates": len(losses),
        "loss_before": losses[0] if losses else None,
        "loss_after": losses[-1] if losses else None,
        "reward_before": before.reward.value,
        "reward_after": after.reward.value,
        "spread_before": _spread(before),
        "spread_after": _spread(after),
    }
    if not losses:
        said = f"not needed, since {_spread(before):.0%} of the groups already have unequal rewards"
    else:
        said = (
            f"{len(losses)} updates, loss {losses[0]:.3g} -> {losses[-1]:.3g} nats per token, sampled reward "
            f"{before.reward.value:.3g} -> {after.reward.value:.3g}, groups with unequal rewards "
            f"{_spread(before):.0%} -> {_spread(after):.0%}"
        )
    return facts | {"in_words": said}


def _key(
    policy: Policy, training: SupervisedTraining, rewards: Rewards, args: TrainSettings, rate: float
) -> str:
    """Hash what the weights after the stage depend on; of a reward function that is its name alone.

    The chat form is part of the demonstrations as the tokenizer writes them; stop strings are not.
    """
    settings: Mapping[str, Any] = {
        "weights": fingerprint(policy.model),
        "pairs": training.pairs,  # prompts and completions as the tokenizer writes them
        "rewards": rewards.names,
        "sampling": [args.max_completion_length, args.num_generations, args.temperature, policy.form.stop],
        "training": [args.warm_start_steps, BATCH, EVERY, PROMPTS, ENOUGH, rate, args.seed],
        "made by": [torch.__version__.split("+")[0], policy.device.type, MADE_BY],
    }
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
