"""What a run keeps and shows: its state, its records, its checkpoints, its end."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from tokenrl.core.baselines import RunningMean
from tokenrl.core.presets import preset_name
from tokenrl.core.rules import entropy_collapse_message, entropy_collapsed, final_entropy
from tokenrl.errors import Stopped, TokenrlError
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.saving import model_card, save_policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import Task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.evaluation import Evaluation
from tokenrl.language.training.step import Record
from tokenrl.language.training.update import Learner
from tokenrl.runs.checkpoint import latest_checkpoint, replace_directory, save_checkpoint
from tokenrl.runs.console import Console, Progress
from tokenrl.runs.directory import RunDirectory, write_json
from tokenrl.runs.metrics import MetricsLog, write_completions
from tokenrl.runs.report import report_from_directory


@dataclass(frozen=True)
class RunResult:
    """What a run came to.

    Attributes:
        output_dir: the run directory.
        exit_reason: `finished`, `learnt` (early: all completions earn the same, more than before), `check`,
            `SIGTERM` or `SIGINT`.
        exit_code: 0, or 128 plus the signal's number.
        steps: steps trained.
        eval_before: `reward` (sampled), `reward_greedy` and more, on held-out prompts, before training.
        eval_after: the same after it; empty if a signal ended the run between two evaluations.
        wall_seconds: from the first evaluation to the last.
        tokens_per_second: completion tokens sampled and trained on, a second of training steps.
        flags: what to know of the outcome: `entropy-collapsed`, or nothing.
        policy: the trained policy.
    """

    output_dir: Path
    exit_reason: str
    exit_code: int
    steps: int
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    wall_seconds: float
    tokens_per_second: float
    flags: tuple[str, ...]
    policy: Policy = field(repr=False)


@dataclass
class Run:
    """A run in progress."""

    args: TrainArguments
    task: Task
    rewards: Rewards
    learner: Learner
    schedule: Any
    stream: PromptStream
    running_mean: RunningMean
    console: Console
    directory: RunDirectory | None = None  # on the main process only
    log: MetricsLog | None = None
    step: int = 0
    tokens: int = 0  # prompt and completion tokens so far
    completion_tokens: float = 0.0
    step_seconds: float = 0.0
    entropies: list[float] = field(default_factory=list)  # of each step, nats a token
    flat_steps: int = 0  # steps in a row in which no rewards differed
    warned: set[str] = field(default_factory=set)

    @property
    def last_entropy(self) -> float:
        """Mean entropy over the last tenth of the steps, in nats a token; nan before the first."""
        return final_entropy(self.entropies)


def record_step(run: Run, record: Record, metrics: dict[str, float], progress: Progress) -> None:
    """Write a step to the log, the completions and the trackers, and show it."""
    args, shown = run.args, run.args.log_completions
    rate = run.completion_tokens / max(run.step_seconds, 1e-9)
    if run.log is not None and run.directory is not None:
        run.log.write(run.step, metrics, record.timings | {"tokens_per_second": rate})
        if shown and (run.step == 1 or run.step % shown == 0 or run.step == args.max_steps):
            rows = record.rows()
            write_completions(run.directory.completions, run.step, rows)
            run.console.completions_table(_few(rows, args.num_generations or 1))
    progress.update(run.step, metrics | {"tokens_per_second": rate})
    if args.report_to and run.step % args.logging_steps == 0:
        run.learner.accelerator.log(metrics, step=run.step)


def _few(rows: Sequence[dict[str, Any]], group: int) -> list[dict[str, Any]]:
    """Best and worst completion of the first two groups: what the comparison within a group looks like."""
    out = []
    rows = [
        row if isinstance(row["prompt"], str) else row | {"prompt": row["prompt"][-1]["content"]}
        for row in rows
    ]
    for start in range(0, min(len(rows), 2 * group), group):
        ranked = sorted(rows[start : start + group], key=lambda row: row["reward"])
        out += [ranked[-1], ranked[0]] if group > 1 else ranked
    return out


def save_run(run: Run) -> None:
    """Save a checkpoint: weights and tokenizer, and how far the run has come."""
    if run.directory is not None:
        state = {
            "step": run.step,
            "stream": run.stream.state_dict(),
            "running_mean": run.running_mean.state_dict(),
            "kl_coef": run.learner.estimator.beta,
        }

        def write(path: Path) -> None:
            save_policy(run.learner.policy, path)
            write_json(path / "trainer_state.json", state)
            if run.learner.critic is not None:
                save_file(run.learner.critic.head.state_dict(), path / "critic.safetensors")

        save_checkpoint(run.directory.checkpoints, run.step, write, keep=run.args.keep_checkpoints)
    run.learner.accelerator.wait_for_everyone()


def facts(run: Run) -> dict[str, Any]:
    """What the header says of a run."""
    args, policy = run.args, run.learner.policy
    trainable = sum(p.numel() for p in policy.trainable_parameters())
    estimator = args.estimator
    return {
        "model": f"{policy.source} ({trainable:,} trainable parameters, {policy.device}, {args.dtype})",
        "task": f"{len(run.task.train_prompts):,} training prompts, {len(run.task.eval_prompts):,} held out",
        "reward": ", ".join(run.rewards.names),
        "estimator": f"baseline {estimator.baseline}, scale {estimator.scale}, {estimator.aggregation}, "
        f"ratio {estimator.ratio}, KL {estimator.beta:g}; bias: {estimator.bias_status}",
        "step": f"{args.prompts_per_step} prompts x {args.num_generations} completions of up to "
        f"{args.max_completion_length} tokens, learning rate {args.learning_rate:g}, seed {args.seed}",
        "run": args.output_dir,
    }


def config(run: Run) -> dict[str, Any]:
    """config.json: the resolved arguments, and what the report and the plot need."""
    solved = getattr(run.task, "solved", None)
    values = {name: getattr(run.args, name) for name in run.args.__dataclass_fields__}
    if not isinstance(values["task"], str):
        values["task"] = run.task.name
    if values["model"] is not None and not isinstance(values["model"], str):
        values["model"] = run.learner.policy.source
    command = shlex.join(["tokenrl", *sys.argv[1:]]) if Path(sys.argv[0]).name == "tokenrl" else None
    title = f"{run.task.name}, {preset_name(run.args.estimator)}, seed {run.args.seed}"
    return {**values, "title": title, "solved": solved, **({"command": command} if command else {})}


def result(
    run: Run, reason: str, code: int, before: Evaluation, after: Evaluation, began: float
) -> RunResult:
    """The run as its caller gets it."""
    return RunResult(
        output_dir=Path(run.args.output_dir),
        exit_reason=reason,
        exit_code=code,
        steps=run.step,
        eval_before=before.metrics,
        eval_after=after.metrics,
        wall_seconds=time.monotonic() - began,
        tokens_per_second=run.completion_tokens / max(run.step_seconds, 1e-9),
        flags=_flags(run),
        policy=run.learner.policy,
    )


def _flags(run: Run) -> tuple[str, ...]:
    collapsed = entropy_collapsed(run.args.estimator.entropy_coef, run.last_entropy)
    return ("entropy-collapsed",) if collapsed else ()


def _summary(ended: RunResult) -> dict[str, Any]:
    names = ("exit_reason", "steps", "wall_seconds", "tokens_per_second", "eval_before", "eval_after")
    return {name: getattr(ended, name) for name in (*names, "flags")}


def finish(run: Run, ended: RunResult) -> None:
    """Save the model, write summary, plot and report, and show the end."""
    if run.directory is not None and run.log is not None:
        run.log.close()
        summary = _summary(ended)
        settings = config(run)
        card_facts = {"task": run.task.name, "base": ended.policy.source, "steps": ended.steps}
        for when, numbers in (("before", ended.eval_before), ("after", ended.eval_after)):
            card_facts |= {
                f"{name} {when}": value for name, value in numbers.items() if name.startswith("reward")
            }
        card = model_card(
            settings["title"],
            card_facts,
            command=settings.get("command") or f"tokenrl train --config {run.directory.config}",
        )
        replace_directory(run.directory.model, lambda path: save_policy(ended.policy, path, card=card))
        run.directory.write_summary(summary)
        report_from_directory(run.directory.path)
        run.console.finish(summary)
        if "entropy-collapsed" in ended.flags:
            run.console.warn(entropy_collapse_message(run.last_entropy))
        run.console.note(
            f"model   {run.directory.model}\ncurve   {run.directory.plot}\nreport  {run.directory.report}"
        )
    if run.args.report_to:
        run.learner.accelerator.end_training()
    run.learner.accelerator.wait_for_everyone()


def failed(run: Run, error: Stopped, before: Evaluation, began: float) -> TokenrlError:
    """Record a run that could not go on, and name what is left of it."""
    if run.directory is None:
        return error
    if run.log is not None:
        run.log.close()
    summary = _summary(result(run, "failed", 1, before, before, began)) | {
        "eval_after": None,
        "error": str(error),
    }
    run.directory.write_summary(summary)
    last = latest_checkpoint(run.directory.checkpoints).path
    kept = (
        f"The last complete checkpoint is {last}." if last else "No checkpoint had been saved (save_every)."
    )
    return Stopped(f"At step {run.step + 1}: {error} {kept}")
