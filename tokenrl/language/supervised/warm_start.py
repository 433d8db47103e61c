"""Teaches a model the form of a task's answers before it is rewarded (`tokenrl train --warm-start`).

A model that never writes anything like an answer gets equal rewards, from which nothing can be learnt. A warm
start is a supervised run of all weights, before an adapter is added, in the folder warm_start of the
training's directory; the training begins with its model. A cache keeps copies of complete warm starts, each
with the last checkpoint, so a longer warm start continues a shorter one. Its learning rate is constant after
the warm-up, so the weights after an update do not depend on the number of updates.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.filesize import decimal

from tokenrl.configuration import read_config
from tokenrl.errors import Interrupted, Refused
from tokenrl.language.evaluation.probe import probe_policy
from tokenrl.language.policy.loading import find_model
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.saved import SavedModel
from tokenrl.language.policy.saving import fingerprint, read_weights, tokenizer_fingerprint
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.distribution import distribution_of
from tokenrl.language.rollout.forward import Forward, choose_forward, choose_precision
from tokenrl.language.rollout.sampling import sampling_of
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.supervised.base import cache_directory, cache_key, locked_in_cache
from tokenrl.language.supervised.defaults import default_rate, demonstrations, parameter_count
from tokenrl.language.supervised.fit import SupervisedTraining, check_trainable
from tokenrl.language.supervised.sft import train_supervised
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import Task
from tokenrl.runs.checkpoint import step_of
from tokenrl.runs.console import Console
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.files import MANIFEST, atomic_directory, remove, trial_directory, verify
from tokenrl.runs.resume import Provenance, find_checkpoint
from tokenrl.runs.session import Session
from tokenrl.runs.signals import SIGNALS

BATCH, WARMUP, SAVED = 16, 10, 50
"""Demonstrations of an update, updates of the learning rate's warm-up, and those between two checkpoints."""
MOST_BYTES = 8 * 10**9
"""Bytes of the cache that warm starts may fill, but for the newest."""
PROMPTS = 32
"""Training prompts on which the sampled reward is measured, before the warm start and after it."""
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


class WarmStart:
    """The warm start of a training.

    Attributes:
        folder: its run directory.
    """

    def __init__(
        self,
        policy: Policy,
        task: Task,
        rewards: Rewards,
        args: Any,
        console: Console,
        accelerator: Any,
        folder: Path,
    ) -> None:
        """Prepare; nothing is trained yet.

        Args:
            policy: the policy, without an adapter; it is moved to the device and trained in place.
            task: the task, with demonstrations.
            rewards: the reward functions, by which the warm start is judged.
            args: the settings of the training, such as how completions are sampled, and the number of updates.
            console: prints remarks.
            accelerator: accelerate's handle of the device to train on.
            folder: the run directory.

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
        self.folder = folder
        self._task = task
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
        shown = rewards.environments.schemas() if rewards.environments else []
        # All that the weights depend on, besides the number of updates.
        ingredients = [model, self._rows, rewards.names, sampling, training]
        self._key = cache_key([*ingredients, shown] if shown else ingredients)

    @cached_property
    def _forward(self) -> Forward:
        """How updates are computed: no two demonstrations share a prompt, so each row is scored whole."""
        forward = choose_forward(self.args, self.policy, self._accelerator, alone=True)[0]
        return replace(forward, scoring=replace(forward.scoring, share_prompt=False))

    @property
    def result(self) -> Path | None:
        """The folder that holds the complete warm start, in the training's directory or in the cache."""
        return next(filter(self._is_complete, (self.folder, self._copy)), None)

    @property
    def _copy(self) -> Path:
        """The folder in the cache that holds a copy of the complete warm start."""
        return cache_directory() / f"warm-start-{self._key}-{self.args.warm_start_steps}"

    def run(self) -> None:
        """Make the warm start in its run directory: all of it, the rest of it, or a copy from the cache.

        Raises:
            Refused: a demonstration cannot be used, or the directory holds something else.
            Stopped: the loss became NaN or infinite, or a reward function failed.
            Interrupted: a signal ended the warm start, after it had been saved.
        """
        if self._is_complete(self.folder):
            return
        with locked_in_cache(f"warm-start-{self._key}", self.console.warn):
            if not self._can_continue():
                self._replace_by_cached()
            if not self._is_complete(self.folder):
                self._train()
                with atomic_directory(self._copy) as copy:
                    _copy_run(self.folder, copy)
                self.console.note(
                    f"the cache, {cache_directory()}, has {decimal(_remove_oldest())} of at most "
                    f"{decimal(MOST_BYTES)}; delete it to empty it"
                )

    def try_out(self) -> float:
        """Make three updates with a learning rate of 0; return the seconds of the third."""
        training = self._training(0.0)
        times = list[float]()
        for _ in range(3):
            times.append(time.perf_counter())
            training.learn()
        self.policy.model.zero_grad(set_to_none=True)
        return time.perf_counter() - times[2]

    def _is_complete(self, folder: Path) -> bool:
        """Return whether a run directory holds this warm start and its undamaged model."""
        with suppress(Refused, OSError, ValueError):
            summary = json.loads((folder / "summary.json").read_bytes())
            steps = summary["steps"] if summary["exit_reason"] == "finished" else None
            is_whole = summary["exit_reason"] == "skipped" or steps == self.args.warm_start_steps
            find_model(folder / "model")
            return is_whole and read_config(folder).get("ingredients") == self._key
        return False

    def _can_continue(self) -> bool:
        """Return whether the run directory holds a checkpoint of this warm start or of a shorter one."""
        with suppress(Refused):  # there is none, or it is damaged
            path, _ = find_checkpoint(self.folder)
            is_short = path is not None and step_of(path) <= self.args.warm_start_steps
            return is_short and read_config(self.folder).get("ingredients") == self._key
        return False

    def _replace_by_cached(self) -> None:
        """Put the longest copy in the cache that is short enough in place of what the run directory holds."""
        RunDirectory(self.folder, overwrite=True).release()  # refuses what no run wrote
        remove(self.folder)
        copies = cache_directory().glob(f"warm-start-{self._key}-*")
        short = [copy for copy in copies if _updates_in_name(copy) <= self.args.warm_start_steps]
        if not short:
            return
        copy = max(short, key=_updates_in_name)
        try:
            verify(copy)
        except Refused as error:
            self.console.warn(f"the warm start in the cache is damaged. {error}")
            return
        with trial_directory(self.folder) as partial:
            _copy_run(copy, partial)
            os.rename(partial, self.folder)
        os.utime(copy)  # the newest now, as it is used
        self.console.note(
            f"The warm start of {_updates_in_name(copy)} updates comes from the cache, {copy}."
        )

    def _training(self, rate: float) -> SupervisedTraining:
        return SupervisedTraining(
            self.policy,
            self._rows,
            max_steps=self.args.warm_start_steps,
            batch_size=BATCH,
            learning_rate=rate,
            schedule="constant",
            warmup_steps=WARMUP,
            seed=self.args.seed,
            forward=self._forward,
            environments=self.rewards.environments,
        )

    def _train(self) -> None:
        """Make the updates that are left, as a supervised run, and judge the result."""
        args = self.args
        settings = SftArguments(
            task="demonstrations",
            output_dir=str(self.folder),
            resume="auto",
            max_steps=args.warm_start_steps,
            batch_size=BATCH,
            learning_rate=self._rate,
            eval_every=0,
            seed=args.seed,
            save_minutes=args.save_minutes,
            save_every=SAVED,
            keep_checkpoints=1,
            quiet=args.quiet,
        )
        title = f"{self._task.name}, warm start, seed {args.seed}"
        with Session("sft", settings) as session:
            header = {
                "demonstrations": f"{len(self._rows):,}",
                "training": f"{args.warm_start_steps} updates of all weights x {BATCH} demonstrations",
                "learning rate": f"{self._rate:g}, constant after {WARMUP} updates",
                "run": session.directory,
            }
            training = self._training(self._rate)
            saved = SavedModel(self.policy)
            provenance = Provenance({}, device=self.policy.device.type)
            session.console.facts(f"warm start: {self._task.name}", header)
            session.open(
                settings,
                saved,
                provenance,
                {"training": training},
                {},
                title=title,
                ingredients=self._key,
            )
            ended = train_supervised(
                session, training, saved, lambda: self._evaluate(session), title, {}
            )
        self.policy.model.zero_grad(set_to_none=True)  # an adapter leaves these weights alone
        if ended.exit_code:
            raise Interrupted(
                f"{SIGNALS[ended.exit_code]} in the warm start, of which {ended.steps} updates are saved: "
                f"the same command with --output-dir {self.folder.parent} continues it.",
                ended.exit_code,
            )

    def _evaluate(self, session: Session) -> dict[str, float]:
        """Sample completions of some training prompts; end the run by the rule of auto before its first step.

        Returns:
            The mean reward, and the shares of groups with equal rewards and of completions that are cut.
        """
        prompts = self._task.train_prompts
        count = min(PROMPTS, len(prompts))
        sampling = sampling_of(self.args)
        sampling = replace(sampling, num_generations=max(2, sampling.num_generations))
        rows = [row for _, row in PromptStream(prompts, self.args.seed).draw_prompts(count)]
        with session.console.status(f"sampling {count} x {sampling.num_generations} completions"):
            self._forward.copy_weights()
            probe = probe_policy(self._forward.policy, rows, self.rewards, sampling)
        metrics = {
            "reward": probe.reward.value,
            "frac_reward_zero_std": 1 - probe.unequal,
            "completions/clipped_ratio": probe.truncated.value,
        }
        largest = 1 - ENOUGH
        equal = metrics["frac_reward_zero_std"]
        cut = metrics["completions/clipped_ratio"]
        has_signal = equal <= largest and cut <= largest
        if session.step and not has_signal:
            session.console.warn(
                f"after {session.step} updates only {1 - equal:.0%} of the groups have unequal rewards, and "
                f"{cut:.0%} of the completions are cut; raise warm_start_steps: it goes on from these updates."
            )
        if has_signal and not session.step and self.args.warm_start == "auto":
            session.ended = "skipped"
        return metrics


def start_from(policy: Policy, folder: Path) -> dict[str, Any]:
    """Give a policy the weights of a complete warm start.

    Args:
        policy: the policy from which the warm start began.
        folder: the run directory of the warm start.

    Returns:
        The facts for config.json and summary.json: `updates`, the loss before and after in nats per token,
        the mean sampled reward on training prompts and the share of groups with unequal rewards before and
        after, and a sentence, `in_words`.

    Raises:
        Refused: the weights cannot be read.
    """
    read_weights(policy.model, folder / "model")
    setattr(policy.model, "name_or_path", str(folder / "model"))  # noqa: B010  # an adapter names its base
    summary = json.loads((folder / "summary.json").read_bytes())
    facts: dict[str, Any] = {"updates": summary["steps"]}
    for moment in ("before", "after"):
        metrics = summary[f"eval_{moment}"]
        facts[f"reward_{moment}"] = metrics["reward"]
        facts[f"spread_{moment}"] = 1 - metrics["frac_reward_zero_std"]
        facts[f"loss_{moment}"] = summary[f"loss_{moment}"]
    sentence = LEARNT if summary["steps"] else SKIPPED
    numbers = {name: math.nan if value is None else value for name, value in facts.items()}
    return facts | {"in_words": sentence.format_map(numbers)}


def _updates_in_name(folder: Path) -> int:
    """Return the number of updates at the end of the name of a folder in the cache."""
    return int(folder.name.rpartition("-")[2])


def _copy_run(source: Path, target: Path) -> None:
    """Copy a run directory into an empty folder; files are linked where the disk allows it."""
    ignored = shutil.ignore_patterns(".lock")
    shutil.copytree(source, target, ignore=ignored, copy_function=_link, dirs_exist_ok=True)
    (target / MANIFEST).unlink(missing_ok=True)  # a continuation changes the files


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _remove_oldest() -> int:
    """Remove the oldest copies from the cache until they fill at most `MOST_BYTES`; return what they fill then.

    The newest stays, and so does a warm start at which a run is at work.
    """
    total = 0
    folders = [folder for folder in cache_directory().glob("warm-start-*") if folder.is_dir()]
    for number, folder in enumerate(sorted(folders, key=os.path.getmtime, reverse=True)):
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        if number and total + size > MOST_BYTES:
            lock = folder.with_name(f"{folder.name.rpartition('-')[0]}.lock")
            with suppress(Timeout), FileLock(lock, timeout=0):
                shutil.rmtree(folder)
                continue
        total += size
    return total
