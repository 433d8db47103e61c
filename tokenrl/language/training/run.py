"""The state of a policy's training run, its result, and what it shows, records and saves."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from tokenrl.core.baselines import RunningMean
from tokenrl.core.presets import preset_name
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.prompts import asked
from tokenrl.language.policy.saving import Card, base_model, save_policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import Task
from tokenrl.language.training.arguments import TrainSettings
from tokenrl.language.training.budget import Budget
from tokenrl.language.training.defaults import Defaults, with_origins
from tokenrl.language.training.learner import Learner
from tokenrl.language.training.records import prompt_text
from tokenrl.language.training.step import Record
from tokenrl.runs.findings import Finding
from tokenrl.runs.metrics import write_completions
from tokenrl.runs.optimizers import load_schedule
from tokenrl.runs.reader import Outcome
from tokenrl.runs.session import Session

PROGRESS = ("steps", "tokens", "samples", "completion_tokens", "step_seconds")
"""The fields of a `Run` that say how far it has come, and that are numbers."""


@dataclass(frozen=True)
class RunResult(Outcome):
    """The result of a training run; see `Outcome` for the other fields.

    Attributes:
        exit_reason: `finished`; `learnt` (ended early: all rewards are equal, and higher than before
            training); `stuck` (ended early too, but below what counts as solved); `check`; or the name of the
            signal that stopped the run, such as `SIGTERM`.
        eval_before: evaluation on held-out prompts before training: `reward` (mean over samples),
            `reward_greedy` and more.
        tokens_per_second: completion tokens sampled and trained on, per second of training steps.
        flags: warnings about the outcome: `policy-destroyed` (the reward fell and did not recover),
            `nothing-learnt` (no gain of held-out rewards beyond noise), `entropy-collapsed`. Of a check, a
            short name for each problem and then for each remark, such as `nothing-to-learn` (all rewards are
            equal); the exit code is 2 if there was a problem.
        warm_started: what `warm_start` found; empty without such a stage.
        policy: the trained policy.
    """

    tokens_per_second: float
    flags: tuple[str, ...]
    warm_started: dict[str, Any]
    policy: Policy = field(repr=False)


@dataclass
class Run:
    """The parts of a run, and how far it has come.

    Attributes:
        args: the settings.
        task: prompts to train on and to evaluate on.
        rewards: the reward functions.
        learner: the policy, its optimiser and the settings.
        schedule: sets the learning rate of each step.
        stream: deals the prompts out to steps.
        running_mean: mean reward of earlier steps.
        threads: the number of threads of torch, and in words where it comes from.
        defaults: the value that each setting has if it is left open, and where the run's value comes from.
        tokens: number of prompt and completion tokens so far.
        samples: number of completions generated so far, greedy and replaced ones included.
        latest: the number of these that the latest step has generated.
        completion_tokens: number of completion tokens so far.
        step_seconds: seconds spent in training steps so far.
        steps: number of steps so far.
        warm_started: what `warm_start` found; empty without such a stage.
        rows: the rows of metrics.jsonl so far, that of the evaluation before training first.
        means: the mean reward of each held-out prompt [B], before training and at the latest evaluation.
        timings: seconds of the latest steps of this process, with those of each reward function.
    """

    args: TrainSettings
    task: Task
    rewards: Rewards
    learner: Learner
    schedule: Any
    stream: PromptStream
    running_mean: RunningMean
    threads: str
    defaults: Defaults
    tokens: int = 0
    samples: int = 0
    latest: int = 0
    completion_tokens: float = 0.0
    step_seconds: float = 0.0
    steps: int = 0
    warm_started: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    timings: deque[dict[str, float]] = field(default_factory=lambda: deque(maxlen=20))

    @property
    def budget(self) -> Budget:
        """How long the run is."""
        return Budget.of(self.args)

    @property
    def spent(self) -> bool:
        """Whether the run has generated all completions that it may, where their number is bounded."""
        return self.budget.spent(self.samples)

    def due(self, session: Session, every: int) -> bool:
        """Return whether something is due in this step: every `every` plain steps, and in the last step."""
        passes = self.budget.passes(every, session.step, self.samples - self.latest, self.samples)
        return passes or session.due(0)

    def set_rate(self) -> None:
        """Set the learning rate of the next step."""
        load_schedule(self.schedule, self.budget.position(self.steps, self.samples))

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens per second of training steps."""
        return self.completion_tokens / max(self.step_seconds, 1e-9)

    @property
    def title(self) -> str:
        """The run in a few words: task, estimator, seed."""
        return f"{self.task.name}, {preset_name(self.args.estimator)}, seed {self.args.seed}"

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation needs of the run itself; its parts have states of their own."""
        return {
            **{name: getattr(self, name) for name in PROGRESS},
            "means": {str(number): means for number, means in enumerate(self.means)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; the learning rate becomes that of this run's schedule."""
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.means = [state["means"][name] for name in sorted(state["means"])]
        self.set_rate()

    def result(self, session: Session, reason: str) -> RunResult:
        """Return the result for the caller; `reason` says how the run ended, unless a signal ended it."""
        return RunResult(
            **session.outcome(reason),
            tokens_per_second=self.tokens_per_second,
            flags=tuple(dict.fromkeys(session.flags)),
            warm_started=self.warm_started,
            policy=self.learner.policy,
        )


def facts(run: Run) -> dict[str, Any]:
    """Return the lines of the header that is printed when the run starts."""
    args, policy = run.args, run.learner.policy
    trainable = sum(p.numel() for p in policy.trainable_parameters())
    estimator = args.estimator
    told = partial(with_origins, args, run.defaults.origins)
    return {
        "model": f"{policy.source} ({trainable:,} trainable parameters, {policy.device}, {args.dtype})",
        "task": f"{len(run.task.train_prompts):,} training prompts, {len(run.task.eval_prompts):,} held out",
        "reward": ", ".join(run.rewards.names),
        "estimator": f"baseline {estimator.baseline}, scale {estimator.scale}, {estimator.aggregation}, "
        f"ratio {estimator.ratio}, KL {estimator.beta:g}; bias: {estimator.bias_status}",
        "training": told(
            " x ", max_steps="{} steps", prompts_per_step="{} prompts", num_generations="{} completions"
        ),
        "completions": told(max_completion_length="up to {} tokens"),
        "learning rate": told(learning_rate="{:g}", lr_scheduler_type="{}")
        + (f", {args.optimizer}" if args.optimizer != "adamw" else ""),
        "seed": args.seed,
        "threads": run.threads,
        **asked(policy.form, args.model),
        "computing": run.learner.forward.words,
        **run.learner.forward.scoring.remarks,
        "run": args.output_dir,
    }


def record_step(run: Run, session: Session, record: Record, metrics: dict[str, float]) -> None:
    """Record a step's metrics, and write and show its completions.

    The metrics come last of what is written: with them a step is complete.
    """
    shown, rows = run.args.log_completions, []
    if session.directory is not None and shown and (session.step == 1 or run.due(session, shown)):
        rows = record.rows()
        write_completions(session.directory.completions, session.step, rows)
    session.record(metrics, record.timings | {"tokens_per_second": run.tokens_per_second})
    if rows:
        session.console.completions_table(_few(rows, run.args.num_generations))


def _few(rows: Sequence[dict[str, Any]], group: int) -> list[dict[str, Any]]:
    """Choose the best and the worst completion of each of the first two groups, as an example for people."""
    out = []
    for start in range(0, min(len(rows), 2 * group), group):
        ranked = sorted(rows[start : start + group], key=lambda row: row["reward"])
        out += [ranked[-1], ranked[0]] if group > 1 else ranked
    return [row | {"prompt": prompt_text(row["prompt"])} for row in out]


def finish(run: Run, session: Session, ended: RunResult, findings: Sequence[Finding]) -> None:
    """Save the model with its card, write summary and report, and show how the run ended, with findings."""
    facts: dict[str, Any] = {"task": run.task.name, "base": ended.policy.source}
    if run.warm_started:
        facts["warm start"] = run.warm_started["in_words"]
    facts |= {"steps": ended.steps, **asked(ended.policy.form)}
    for when, numbers in (("before", ended.eval_before), ("after", ended.eval_after)):
        facts |= {f"{name} {when}": value for name, value in numbers.items() if name.startswith("reward")}
    card = Card(run.title, facts, session.origin.in_words(), base_model(run.args.model))
    session.finish(ended, lambda path: save_policy(ended.policy, path, card=card))
    for finding in findings:
        session.console.warn(str(finding))
    run.learner.accelerator.wait_for_everyone()
