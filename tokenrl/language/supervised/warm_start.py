"""Teaches a model the form of a task's answers before it is rewarded, and keeps the result in a cache.

A model that never writes anything like an answer gets equal rewards, from which nothing can be learnt. The
tiny models of toy tasks are made by a fixed number of updates on demonstrations. `tokenrl train --warm-start`
trains all weights of any model, before an adapter is added. That stage has a run directory of its own in the
cache, with checkpoints: a stage that was interrupted continues, and a longer stage continues a shorter one.
Its learning rate is constant after the warm-up, so the weights after an update do not depend on its length.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.filesize import decimal

from tokenrl.errors import Interrupted, Refused, describe
from tokenrl.language.evaluation.probe import probe_policy
from tokenrl.language.policy.loading import find_model
from tokenrl.language.policy.model import Policy, wrap
from tokenrl.language.policy.saved import SavedModel
from tokenrl.language.policy.saving import (
    fingerprint,
    read_weights,
    save_policy,
    tokenizer_fingerprint,
)
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.distribution import distribution_of
from tokenrl.language.rollout.forward import Forward, choose_forward, choose_precision
from tokenrl.language.rollout.sampling import sampling_of
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.supervised.defaults import default_rate, demonstrations, parameter_count
from tokenrl.language.supervised.fit import SupervisedTraining, check_trainable, fit
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import Task
from tokenrl.runs.checkpoint import step_of
from tokenrl.runs.console import Console
from tokenrl.runs.files import atomic_directory, write_json
from tokenrl.runs.resume import Provenance, find_checkpoint
from tokenrl.runs.session import Session
from tokenrl.runs.signals import SIGNALS
from tokenrl.runs.threads import using_threads
from tokenrl.settings import check_seed

MADE_BY = 3  # to raise when the weights of a warm start change, or what its checkpoints hold
BATCH, WARMUP, SAVED = 16, 10, 50
"""Demonstrations of an update, updates of the learning rate's warm-up, and those between two checkpoints."""
MOST_BYTES = 8 * 10**9
"""Bytes of the cache that warm starts may fill, but for those of the stage that has just ended."""
PROMPTS = 32
"""Training prompts on which the sampled reward is measured, before the stage and after it."""
ENOUGH = 0.5
"""The share of groups with unequal rewards, and of completions with an end, with which auto skips it."""

SKIPPED = (
    "skipped by the rule of auto, since {spread_before:.0%} of the groups already have unequal rewards; "
    "--warm-start without auto always runs"
)
LEARNT = (
    "{updates} updates, loss {loss_before:.3g} -> {loss_after:.3g} nats per token, sampled reward "
    "{reward_before:.3g} -> {reward_after:.3g}, groups with unequal rewards {spread_before:.0%} -> "
    "{spread_after:.0%}"
)


def cache_directory() -> Path:
    """Return the directory of warm-started models: $TOKENRL_CACHE, else tokenrl/ in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TOKENRL_CACHE") or Path(home) / "tokenrl")


def _cache_folder(kind: str, ingredients: Any) -> Path:
    """Return the folder in the cache for what is made from these ingredients; it need not exist yet."""
    key = json.dumps([ingredients, torch.__version__.split("+")[0], MADE_BY], default=str)
    return cache_directory() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _remove_oldest() -> int:
    """Remove old warm starts until they fill at most `MOST_BYTES`; return how many bytes they fill then.

    Results come before the runs that made them, which hold the optimiser too and only serve to go on from.
    The newest of both stays, and so do those of other runs at work, which hold their locks.
    """
    total = 0
    for kind in ("warm-start-", "warm-start-run-"):
        folders = cache_directory().glob(kind + 16 * "[0-9a-f]")
        for number, folder in enumerate(sorted(folders, key=os.path.getmtime, reverse=True)):
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            if number and total + size > MOST_BYTES:
                with suppress(Timeout), FileLock(f"{folder}.lock", timeout=0):
                    shutil.rmtree(folder)
                    continue
            total += size
    return total


def _make_once(
    directory: Path, make: Callable[[Path], None], warn: Callable[[str], None]
) -> tuple[Path, bool]:
    """Return the folder of a model in the cache, made by whoever needs it first.

    Args:
        directory: the folder.
        make: fills the empty folder that it is given, if there is none yet or it is damaged.
        warn: prints a warning.

    Returns:
        The folder, and whether it was there before.

    Raises:
        Refused: the cache cannot be written.
    """
    lock = FileLock(f"{directory}.lock")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        try:
            held = lock.acquire(blocking=False)
        except Timeout:
            warn(f"waiting for another run, which is making {directory}")
            held = lock.acquire()
    except OSError as error:
        where = f"Warm-started models are kept in {directory.parent}, which cannot be written"
        raise Refused(
            f"{where} ({describe(error)}). Set TOKENRL_CACHE to another directory."
        ) from error
    with held:
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
        mend = "name one, --model DIRECTORY_OR_HUB_NAME, or --model tiny for a new one"
        raise Refused(f"The task {task.name!r} has no model of its own: {mend}.")
    check_seed(seed)

    def make(folder: Path) -> None:
        policy = wrap(*task.build(seed), source=f"{task.name} base")
        warm = task.warm_start
        if warm is not None:
            rows = task.demonstrations
            steps = f"{warm.steps} steps; cached for next time"
            announce(f"Warm-starting a tiny model on {len(rows)} demonstrations ({steps}).")
            options = {
                "batch_size": warm.batch_size,
                "learning_rate": warm.learning_rate,
                "seed": seed,
            }
            fit(policy, rows, max_steps=warm.steps, **options)
        save_policy(policy, folder)

    with using_threads(1):  # the same weights for everyone
        return _make_once(_cache_folder(task.name, [task.fingerprint, seed]), make, announce)[0]


class WarmStart:
    """The supervised stage of a run."""

    def __init__(
        self,
        policy: Policy,
        task: Task,
        rewards: Rewards,
        args: Any,
        console: Console,
        accelerator: Any,
    ) -> None:
        """Prepare; nothing is trained yet.

        Args:
            policy: the policy, without an adapter; it is moved to the device and trained in place.
            task: the task, with demonstrations.
            rewards: the reward functions, by which the stage is judged.
            args: the settings of the run: how completions are sampled, the seed, the number of updates.
            console: shows the progress.
            accelerator: accelerate's handle of the device to train on.

        Raises:
            Refused: there are no demonstrations, or the model cannot be used.
        """
        if policy.has_adapter:
            raise Refused(
                "warm_start trains all weights, but the model has an adapter: merge it first."
            )
        check_trainable(policy)
        policy.model.to(accelerator.device)
        self.policy = policy
        self.rewards = rewards
        self.args = args
        self.console = console
        self._prompts = task.train_prompts
        self._rows = demonstrations(task)
        self._accelerator = accelerator
        self._rate = default_rate(parameter_count(policy), supervised=True)
        tokenizer = tokenizer_fingerprint(policy.tokenizer)
        model = [fingerprint(policy.model), tokenizer, vars(policy.form)]
        sampling = [args.max_completion_length, args.num_generations, distribution_of(args)]
        precision = choose_precision(args, policy, accelerator)[0]
        computing = [accelerator.device.type, precision, args.training_attention]
        constants = [BATCH, WARMUP, PROMPTS, ENOUGH]
        training = [args.warm_start, *constants, self._rate, args.seed, *computing]
        # All that the weights depend on, besides the number of updates.
        self._ingredients = [model, self._rows, rewards.names, sampling, training]

    @cached_property
    def _forward(self) -> Forward:
        """How updates are computed: no two demonstrations share a prompt, so each row is scored whole."""
        forward = choose_forward(self.args, self.policy, self._accelerator, alone=True)[0]
        return replace(forward, scoring=replace(forward.scoring, share_prompt=False))

    @property
    def folder(self) -> Path:
        """The folder in the cache that holds the result, as soon as it has been made."""
        return _cache_folder("warm-start", [self._ingredients, self.args.warm_start_steps])

    def run(self) -> dict[str, Any]:
        """Train all weights on the demonstrations, or take them from the cache.

        Returns:
            The facts for config.json and summary.json: `updates`, the loss before and after in nats per
            token, the mean sampled reward on training prompts and the share of groups with unequal rewards
            before and after; `in_words`, a sentence; and `kept_in`, the folder in the cache.

        Raises:
            Refused: a demonstration cannot be used.
            Stopped: the loss became NaN or infinite, or a reward function failed.
            Interrupted: a signal ended the stage, after it had been saved.
        """
        directory, cached = _make_once(self.folder, self._make, self.console.warn)
        if cached:
            read_weights(self.policy.model, directory)
        setattr(self.policy.model, "name_or_path", str(directory))  # noqa: B010  # an adapter names its base
        facts: dict[str, Any] = json.loads((directory / "warm_start.json").read_bytes())
        stage = "warm start, from the cache" if cached else "warm start"
        self.console.note(f"{stage}: {facts['in_words']}.")
        with suppress(OSError):  # of a cache that others own, write or empty at the same time
            os.utime(directory)  # the newest now, as it is used
            if not cached:
                size = decimal(_remove_oldest())
                self.console.note(
                    f"the cache, {cache_directory()}, has {size} of at most {decimal(MOST_BYTES)}; delete it "
                    "to empty it"
                )
        return facts | {"kept_in": str(directory)}

    def try_out(self) -> float:
        """Make three updates with a learning rate of 0; return the seconds of the third."""
        training = self._training(0.0)
        times = list[float]()
        for _ in range(3):
            times.append(time.perf_counter())
            training.learn()
        self.policy.model.zero_grad(set_to_none=True)
        return time.perf_counter() - times[2]

    def _training(self, rate: float) -> SupervisedTraining:
        options: dict[str, Any] = {"max_steps": self.args.warm_start_steps, "batch_size": BATCH}
        options |= {"learning_rate": rate, "schedule": "constant", "warmup_steps": WARMUP}
        options |= {"seed": self.args.seed, "forward": self._forward}
        return SupervisedTraining(self.policy, self._rows, **options)

    def _make(self, folder: Path) -> None:
        """Continue an earlier stage from its checkpoint or start a new one; write the model into a folder."""
        args = self.args
        most = self.args.warm_start_steps
        run = _cache_folder("warm-start-run", self._ingredients)
        stage = f"{most} updates of all weights on {BATCH} of {len(self._rows):,} demonstrations"
        self.console.note(
            f"warm start: {stage}, learning rate {self._rate:g}; kept in {cache_directory()}"
        )
        # It waits for a stage of another length, where a session would refuse.
        with FileLock(f"{run}.lock"):
            going_on = _can_continue(run, most)
            settings: dict[str, Any] = {"output_dir": str(run), "overwrite": not going_on}
            settings |= {name: getattr(args, name) for name in ("quiet", "save_minutes", "seed")}
            settings |= {
                "resume": "auto" if going_on else None,
                "save_every": SAVED,
                "keep_checkpoints": 1,
            }
            settings |= {
                "max_steps": most,
                "batch_size": BATCH,
                "learning_rate": self._rate,
                "eval_every": 0,
            }
            facts, code = self._learn(SftArguments(task="demonstrations", **settings))
            if code:
                message = f"{SIGNALS[code]} in the warm start, of which {facts['updates']} updates are saved"
                raise Interrupted(f"{message}: the same command goes on from there.", code)
            save_policy(self.policy, folder)
            write_json(folder / "warm_start.json", facts)
            shutil.copy(run / "metrics.jsonl", folder)

    def _learn(self, settings: SftArguments) -> tuple[dict[str, Any], int]:
        """Make the updates; return the facts, and the exit code of the signal that ended them, or 0."""
        training = self._training(self._rate)
        most = settings.max_steps
        args = self.args
        with Session("sft", settings) as session:
            session.console.each = "warm start"
            provenance = Provenance({}, device=self.policy.device.type)
            saved = SavedModel(self.policy)
            session.open(settings, saved, provenance, {"training": training}, {})
            if not session.continues:
                session.evaluated(self._probe())
            before = session.eval_before
            if args.warm_start == "auto" and _has_signal(before):
                session.ended = "skipped"
            for _ in session.steps():
                with session.update():
                    metrics = training.learn()
                session.record(metrics)
            session.save()
            code = session.stop.exit_code
            after = before
            if training.step and not code:
                after = self._probe()
        # an adapter leaves these weights alone: free them
        self.policy.model.zero_grad(set_to_none=True)
        if training.step == most and not _has_signal(after):
            shares = f"{after['unequal']:.0%} of the groups have unequal rewards"
            cut = f"{after['truncated']:.0%} of the completions are cut"
            mend = f"raise warm_start_steps: it goes on from these {most}"
            self.console.warn(f"after {most} updates only {shares}, and {cut}; {mend}.")
        facts: dict[str, Any] = {"updates": training.step}
        for when, probe in (("before", before), ("after", after)):
            facts |= {f"reward_{when}": probe["reward"], f"spread_{when}": probe["unequal"]}
            facts[f"loss_{when}"] = getattr(training, f"loss_{when}")
        sentence = LEARNT if training.step else SKIPPED
        return facts | {"in_words": sentence.format_map(facts)}, code

    def _probe(self) -> dict[str, float]:
        """Measure the sampled reward, the share of unequal groups and that of completions that are cut."""
        count = min(PROMPTS, len(self._prompts))
        sampling = sampling_of(self.args)
        sampling = replace(sampling, num_generations=max(2, sampling.num_generations))
        prompts = [
            row for _, row in PromptStream(self._prompts, self.args.seed).draw_prompts(count)
        ]
        with self.console.status(
            f"sampling {len(prompts)} x {sampling.num_generations} completions"
        ):
            self._forward.copy_weights()
            probe = probe_policy(self._forward.policy, prompts, self.rewards, sampling)
        return {
            "reward": probe.reward.value,
            "unequal": probe.unequal,
            "truncated": probe.truncated.value,
        }


def _can_continue(directory: Path, most: int) -> bool:
    """Return whether a stage of `most` updates can continue from the checkpoint of an earlier stage."""
    try:
        path, _ = find_checkpoint(directory, "auto")
    except Refused:  # it is damaged
        return False
    return path is None or step_of(path) <= most


def _has_signal(probe: dict[str, float]) -> bool:
    """Return whether enough groups have unequal rewards and enough completions end by themselves."""
    return probe["unequal"] >= ENOUGH and probe["truncated"] <= 1 - ENOUGH
