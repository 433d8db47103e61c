"""Teaches a model the form of a task's answers before it is rewarded, and keeps the result in a cache.

A model that never writes anything like an answer gets equal rewards, from which nothing can be learnt. The
tiny models of toy tasks are made by a fixed number of updates on demonstrations. `tokenrl train --warm-start`
trains all weights of any model, before an adapter is added, until enough groups of sampled completions have
unequal rewards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.loading import find_model
from tokenrl.language.policy.model import Policy, wrap
from tokenrl.language.policy.saving import fingerprint, read_weights, save_policy, tokenizer_fingerprint
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.agreement import agree
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.defaults import default_rate, demonstrations, parameter_count
from tokenrl.language.training.probe import Probe, probe_policy
from tokenrl.language.training.supervised import check_trainable, fit
from tokenrl.runs.console import Console
from tokenrl.runs.files import write_json
from tokenrl.runs.folders import atomic_directory
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import check_seed

MADE_BY = 2  # raise it when a change of the code changes the weights that a warm start gives
BATCH = 16
"""Demonstrations per update."""
EVERY, PROMPTS = 20, 32
"""Updates between two probes of the sampled reward, and the training prompts of a probe."""
ENOUGH = 0.5
"""The stage ends once this share of groups has unequal rewards, and this share of completions an end."""


def cache_directory() -> Path:
    """Return the directory of warm-started models: $TOKENRL_CACHE, else tokenrl/ in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TOKENRL_CACHE") or Path(home) / "tokenrl")


def _made_once(
    kind: str, made_from: Any, make: Callable[[Path], None], warn: Callable[[str], None]
) -> tuple[Path, bool]:
    """Return the folder of a model in the cache, made by whoever needs it first.

    Args:
        kind: the beginning of the folder's name.
        made_from: all that the weights depend on besides the version of torch; its hash ends the name.
        make: fills the empty folder that it is given, if there is none yet or it is damaged.
        warn: prints a warning.

    Returns:
        The folder, and whether it was there before.

    Raises:
        Refused: the cache cannot be written.
    """
    from filelock import FileLock

    known = json.dumps([made_from, torch.__version__.split("+")[0], MADE_BY], default=str)
    directory = cache_directory() / f"{kind}-{hashlib.sha256(known.encode()).hexdigest()[:16]}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{directory}.lock").acquire()
    except OSError as error:
        where = f"Warm-started models are kept in {directory.parent}, which cannot be written"
        raise Refused(f"{where} ({describe(error)}). Set TOKENRL_CACHE to another directory.") from error
    with lock:
        if directory.exists():
            try:
                find_model(directory)
                return directory, True
            except Refused as error:
                warn(f"the cached model {directory} is damaged, and is made again. {error}")
        with atomic_directory(directory) as folder:
            make(folder)
    return directory, False


def warm_started_base(
    task: Any, *, seed: int = 0, announce: Callable[[str], None] = lambda text: None
) -> Path:
    """Make the tiny model of a toy task, warm-started on its demonstrations, or take it from the cache.

    Args:
        task: a task with `build(seed)`, `demonstrations`, `warm_start` and `fingerprint`.
        seed: seed of the initial weights and of the order of demonstrations.
        announce: prints a line for people, since making the model takes some seconds.

    Returns:
        The directory of model and tokenizer.

    Raises:
        Refused: the task has no model of its own, or the seed has more than 32 bits.
    """
    if getattr(task, "build", None) is None:
        raise Refused(f"The task {task.name!r} has no model of its own: --model DIRECTORY_OR_HUB_NAME.")
    check_seed(seed)

    def make(folder: Path) -> None:
        policy, warm = wrap(*task.build(seed), source=f"{task.name} base"), task.warm_start
        if warm is not None:
            rows, steps = task.demonstrations, f"{warm.steps} steps; cached for next time"
            announce(f"Warm-starting a tiny model on {len(rows)} demonstrations ({steps}).")
            how = {"batch_size": warm.batch_size, "learning_rate": warm.learning_rate, "seed": seed}
            fit(policy, rows, max_steps=warm.steps, **how)
        save_policy(policy, folder)

    with using_threads(1):  # the same weights for everyone
        return _made_once(task.name, [task.fingerprint, seed], make, announce)[0]


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
    rate, most = default_rate(parameter_count(policy), supervised=True), args.warm_start_steps
    depends_on = {
        "model": [fingerprint(policy.model), tokenizer_fingerprint(policy.tokenizer), vars(policy.form)],
        "rows": rows,
        "rewards": rewards.names,
        "sampling": [args.max_completion_length, args.num_generations, args.temperature],
        "training": [most, BATCH, EVERY, PROMPTS, ENOUGH, rate, args.seed, device.type],
    }

    def make(folder: Path) -> None:
        goal = f"until half of the groups have unequal rewards; kept in {cache_directory()}"
        what = f"at most {most} updates of all weights on {BATCH} of {len(rows):,} demonstrations"
        console.note(f"warm start: {what},\nlearning rate {rate:g}, {goal}")
        with using_threads(choose_threads(policy.size, args.threads)[0]):
            facts = _train(policy, rows, task, rewards, args, console, rate)
        save_policy(policy, folder)
        write_json(folder / "warm_start.json", facts)

    directory, found = _made_once("warm-start", depends_on, make, console.warn)
    if found:
        read_weights(policy.model, directory)
    setattr(policy.model, "name_or_path", str(directory))  # noqa: B010  # an adapter names its base by it
    facts: dict[str, Any] = json.loads((directory / "warm_start.json").read_bytes())
    console.note(f"warm start{', from the cache' * found}: {facts['in_words']}.")
    return facts


def _train(
    policy: Policy, rows: Any, task: Any, rewards: Rewards, args: TrainSettings, console: Console, rate: float
) -> dict[str, Any]:
    """Update on demonstrations until a probe is good enough, or the updates are used up; return the facts."""
    most, probes, length = args.warm_start_steps, list[Probe](), args.max_completion_length
    stream = PromptStream(task.train_prompts, min(PROMPTS, len(task.train_prompts)), args.seed)
    prompts, size = [row for _, row in stream.next()], max(2, args.num_generations)
    cut = {"truncate_prompts": args.truncate_prompts}
    sampling = Sampling(length, size, args.temperature, args.seed, **cut)

    def enough(losses: list[float]) -> bool:
        if len(losses) % EVERY == 0 or len(losses) == most:  # the same prompts and numbers each time
            probes.append(probe_policy(policy, prompts, rewards, sampling))
        if losses:
            progress.update(len(losses), {"loss": losses[-1], "reward": probes[-1].reward.value})
        return _is_enough(probes[-1])

    try:
        with console.progress(most) as progress:
            how = {"batch_size": BATCH, "learning_rate": rate, "seed": args.seed}
            losses = fit(policy, rows, max_steps=most, until=enough, scoring=agree(policy), **how)
    except KeyboardInterrupt:
        console.warn("interrupted in the warm start: nothing of it is kept.")
        raise
    policy.model.zero_grad(set_to_none=True)  # an adapter leaves these weights alone: free their gradients
    before, after = probes[0], probes[-1]
    if not _is_enough(after):
        found = (
            f"only {after.unequal:.0%} of the groups have unequal rewards, and {after.truncated.value:.0%}"
        )
        console.warn(f"after {most} updates {found} of the completions are cut: raise warm_start_steps.")
    facts: dict[str, Any] = {"updates": len(losses)}
    for when, probe, loss in (("before", before, losses[:1]), ("after", after, losses[-1:])):
        facts |= {f"reward_{when}": probe.reward.value, f"spread_{when}": probe.unequal}
        facts[f"loss_{when}"] = loss[0] if loss else None
    said = "not needed, since {spread_before:.0%} of the groups already have unequal rewards"
    if losses:
        said = "{updates} updates, loss {loss_before:.3g} -> {loss_after:.3g} nats per token, sampled reward "
        said += (
            "{reward_before:.3g} -> {reward_after:.3g}, groups with unequal rewards {spread_before:.0%} -> "
        )
        said += "{spread_after:.0%}"
    return facts | {"in_words": said.format_map(facts)}


def _is_enough(found: Probe) -> bool:
    return found.unequal >= ENOUGH and found.truncated.value <= 1 - ENOUGH
