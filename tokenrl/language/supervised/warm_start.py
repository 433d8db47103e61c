"""Teaches a model the form of a task's answers before it is rewarded (`tokenrl train --warm-start`).

A model that never writes anything like an answer gets equal rewards, from which nothing can be learnt. A warm
start is a supervised run of all weights, before an adapter is added, in the folder warm_start of the
training's directory; the training begins with its model. Its learning rate is constant after the warm-up,
so the weights after an update do not depend on the number of updates, and a longer warm start continues a
shorter one.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.errors import Interrupted, Refused
from tokenrl.language.evaluation.probe import probe_policy
from tokenrl.language.policy.loading import find_model
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.saved import SavedModel
from tokenrl.language.policy.saving import fingerprint, read_weights, tokenizer_fingerprint
from tokenrl.language.rewards.calls import TrainerState
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.distribution import distribution_of
from tokenrl.language.rollout.forward import Forward, choose_forward, choose_precision
from tokenrl.language.rollout.sampling import sampling_of
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.supervised.base import cache_key
from tokenrl.language.supervised.defaults import default_rate, demonstrations, parameter_count
from tokenrl.language.supervised.fit import SupervisedTraining, as_in_episodes, check_trainable
from tokenrl.language.supervised.sft import train_supervised
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import Task
from tokenrl.runs.checkpoint import step_of
from tokenrl.runs.console import Console
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.files import remove, verify
from tokenrl.runs.resume import Provenance, find_checkpoint
from tokenrl.runs.session import Session
from tokenrl.runs.signals import SIGNALS

BATCH, WARMUP, SAVED = 16, 10, 50
"""Demonstrations of an update, updates of the learning rate's warm-up, and those between two checkpoints."""
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
        rewards.state = TrainerState(max_steps=args.max_steps)
        self.args = args
        self.console = console
        self.folder = folder
        self._task = task
        self._rows = demonstrations(task)
        if rewards.environments is not None:
            self._rows = as_in_episodes(self._rows, rewards.environments, console.warn)
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
    def is_complete(self) -> bool:
        """Whether the run directory holds this warm start and its undamaged model."""
        with suppress(Refused, OSError, ValueError):
            summary = json.loads((self.folder / "summary.json").read_bytes())
            steps = summary["steps"] if summary["exit_reason"] == "finished" else None
            is_whole = summary["exit_reason"] == "skipped" or steps == self.args.warm_start_steps
            find_model(self.folder / "model")
            return is_whole and read_config(self.folder).get("ingredients") == self._key
        return False

    def run(self) -> None:
        """Make the warm start in its run directory, all of it or the rest of it, unless it is complete.

        Raises:
            Refused: a demonstration cannot be used, or the directory holds something else.
            Stopped: the loss became NaN or infinite, or a reward function failed.
            Interrupted: a signal ended the warm start, after it had been saved.
        """
        if self.is_complete:
            return
        if not self._can_continue():
            RunDirectory(self.folder, overwrite=True).release()  # refuses what no run wrote
            remove(self.folder)
        self._train()

    def _can_continue(self) -> bool:
        """Return whether the run directory holds a checkpoint of this warm start or of a shorter one."""
        with suppress(Refused):  # there is none, or it is damaged
            path, _ = find_checkpoint(self.folder)
            is_short = path is not None and step_of(path) <= self.args.warm_start_steps
            return is_short and read_config(self.folder).get("ingredients") == self._key
        return False

    def _training(self) -> SupervisedTraining:
        return SupervisedTraining(
            self.policy,
            self._rows,
            max_steps=self.args.warm_start_steps,
            batch_size=BATCH,
            learning_rate=self._rate,
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
            chat_time=self.policy.form.chat_time,
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
            training = self._training()
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


def is_needed(args: Any) -> bool:
    """Return whether a training reads the weights of its warm start also once it has begun.

    They lie below an adapter, and are the reference of a KL without a teacher.
    """
    is_reference = args.estimator.needs_reference and args.teacher is None
    return bool(args.lora_r) or is_reference


def is_missing(args: Any, folder: Path) -> bool:
    """Return whether a training that has begun needs a warm start that is damaged or gone."""
    with suppress(Refused):
        verify(folder / "model")
        return False
    return is_needed(args)


def folder_of(run: str) -> Path:
    """Return the run directory of the warm start of a training, from that of the training."""
    return Path(run).absolute() / "warm_start"


def time_of(run: str) -> str | None:
    """Return the time that the chat template reads in the warm start that a training began; None without it."""
    with suppress(Refused):
        return read_config(folder_of(run) / "config.json").get("chat_time")
    return None


def start_from(policy: Policy, folder: Path) -> None:
    """Give the policy from which a warm start began the weights with which it ended.

    Raises:
        Refused: the weights cannot be read.
    """
    read_weights(policy.model, folder / "model")
    setattr(policy.model, "name_or_path", str(folder / "model"))  # noqa: B010  # an adapter names its base


def facts_of(folder: Path, *, continues: bool) -> dict[str, Any]:
    """Return the facts of a complete warm start for config.json and summary.json.

    Args:
        folder: its run directory, in that of the training.
        continues: whether the training continues, so that its config.json has them.

    Returns:
        `updates`, the loss before and after in nats per token, the mean sampled reward on training prompts
        and the share of groups with unequal rewards before and after, and a sentence, `in_words`.
    """
    if continues:
        return dict(read_config(folder.parent).get("warm_started", {}))
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
