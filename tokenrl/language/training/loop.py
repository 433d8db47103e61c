"""Trains a language model: prepares the run, then loops over training steps, evaluations and checkpoints."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tokenrl.core.baselines import RunningMean
from tokenrl.errors import Stopped, describe
from tokenrl.language.policy.prompts import settled_form, special_texts
from tokenrl.language.policy.saving import SavedPolicy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.memory import recorded
from tokenrl.language.tasks.stream import PromptStream, few_prompts
from tokenrl.language.tasks.task import Task, find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.batch import others_needed, summed
from tokenrl.language.training.check import check_run
from tokenrl.language.training.defaults import training_defaults
from tokenrl.language.training.evaluation import evaluate_policy
from tokenrl.language.training.mistakes import without_effect
from tokenrl.language.training.run import Run, RunResult, facts, finish, record_step
from tokenrl.language.training.setup import (
    adapt,
    load_base,
    made_from,
    make_accelerator,
    make_learner,
    resolve,
    resolved,
)
from tokenrl.language.training.step import Record, training_step
from tokenrl.language.training.verdicts import judge_end, judge_step
from tokenrl.language.training.warm_start import warm_start
from tokenrl.runs.reader import read_run
from tokenrl.runs.resume import taken_up
from tokenrl.runs.session import Session
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import called


def train(args: TrainArguments | None = None, **options: Any) -> RunResult:
    """Train a language model by policy gradients; the keywords are the fields of `TrainArguments`.

    Where the command line takes names, the keywords also take objects: `model` a directory, a hub name, a
    `(model, tokenizer)` pair or a `Policy`; `task` a name, a task object, or data; `reward` one function or
    several; `estimator` a preset's name or an `Estimator`.

    Data is a `datasets.Dataset`, a list of rows (dicts), or a dict of splits such as a `DatasetDict`. A row
    has a `prompt`, text or chat messages, and its other columns reach the reward as lists. If it has a whole
    conversation in `messages` instead, a last turn of the assistant becomes the column `answer`. The splits
    train and validation or test become training and held-out prompts; data without splits is divided, as
    `eval_size` says. The run's config.json describes data but does not hold it.

    Args:
        args: all arguments at once, instead of keywords.
        **options: the fields of `TrainArguments`.

    Returns:
        The trained policy, the evaluations before and after training, and how the run ended.

    Raises:
        Refused: the arguments, the model or the data cannot be used; raised before the first step.
        Stopped: the run failed after it had begun; what was saved until then is kept.

    Example:
        >>> import tokenrl
        >>> result = tokenrl.train(task="sort_digits", estimator="rloo", output_dir="runs/a")
        >>> result.eval_after["reward_greedy"]
    """
    asked = settled_form(called(TrainArguments, args, options))
    args = taken_up(asked, asked.resume, asked.output_dir)
    task, rewards = find_task(args)
    accelerator = make_accelerator(resolve(args, task))  # refused before anything is loaded
    with (
        Session(
            "train",
            args.output_dir,
            overwrite=args.overwrite,
            quiet=args.quiet,
            every=args.logging_steps if args.logging_steps > 1 else 10,
            main=accelerator.is_main_process,
            agreed=partial(_largest, accelerator),
            tracking=args,
            saving=args,
        ) as session,
        others_needed(),
        memory_needed(),
    ):
        run = _prepare(args, task, rewards, accelerator, session)
        args = run.args
        with closing(run.learner.generator), using_threads(args.threads):
            session.open(f"tokenrl train: {run.task.name}", facts(run))
            for warning in _warnings(run, asked):
                session.console.warn(warning)
            if args.check:
                return check_run(run, session, partial(_evaluate, run, step=0))
            _check_lengths(run)
            if not session.continues:
                session.evaluated(_evaluate(run, step=0))
            names = {"task": run.task.name, "model": run.learner.policy.source}
            known = {"solved": getattr(run.task, "solved", None), **recorded(run.task)}
            known |= {"warm_started": run.warm_started} if run.warm_started else {}
            session.begin(args, names=names, title=run.title, **known)
            if session.continues:
                run.rows = [
                    row for row in read_run(session.output_dir).metrics if row["step"] <= session.step
                ]
            run.learner.sync()  # the weights may be those of a checkpoint
            return _loop(run, session)


def _loop(run: Run, session: Session) -> RunResult:
    """Train until the last step, a signal to stop, or a step after which nothing is left to learn."""
    args, reason = run.args, session.ended or "finished"
    for step in session.steps(args.max_steps):
        record = _one_step(run, step)
        metrics = dict(record.metrics)
        if run.due(session, args.eval_every):
            metrics |= session.evaluated(_evaluate(run, step))
        record_step(run, session, record, metrics)
        run.rows.append({"step": step, **metrics})
        if ended_by := judge_step(run, session):
            reason = ended_by
            break
    if session.owes_evaluation:
        session.evaluated(_evaluate(run, session.step))
    findings = judge_end(run, session, reason)
    ended = run.result(session, reason)
    finish(run, session, ended, findings)
    return ended


def _prepare(given: TrainArguments, task: Task, rewards: Rewards, accelerator: Any, session: Session) -> Run:
    """Load the policy, make optimiser and generator, and choose the training prompts."""
    with accelerator.main_process_first():
        policy = load_base(given, task, session.console.note)
        defaults, warmed = training_defaults(given, task, policy), {}
        args = resolved(given, defaults)
        if args.warm_start:
            warmed = warm_start(policy, task, rewards, args, session.console, accelerator.device)
        adapt(args, policy)
    maker = made_from(policy, {"train": task.train_prompts, "eval": task.eval_prompts}, accelerator)
    threads, why = choose_threads(policy.size, args.threads)
    with using_threads(threads):
        learner, schedule = make_learner(replace(args, threads=threads), policy, accelerator)
    estimator = args.estimator
    run = Run(
        args=learner.args,
        threads=f"{threads} ({why})",
        task=task,
        rewards=rewards,
        learner=learner,
        schedule=schedule,
        stream=PromptStream(task.train_prompts, args.prompts_per_step, args.seed),
        running_mean=RunningMean(estimator.running_mean_decay, estimator.running_mean_init),
        defaults=defaults,
        warm_started=warmed,
    )
    session.spent = lambda: run.spent
    session.keep(
        SavedPolicy(policy),
        maker,
        stream=run.stream,
        running_mean=run.running_mean,
        learner=learner,
        run=run,
    )
    return run


def _warnings(run: Run, asked: TrainArguments) -> list[str]:
    """Return what is said before the first step of prompts and settings that are probably mistakes."""
    rows = run.task.train_prompts
    special = special_texts(run.learner.policy.tokenizer, [row["prompt"] for row in rows])
    return [*few_prompts(rows), *special, *without_effect(run.args, asked)]


def _check_lengths(run: Run) -> None:
    """Refuse prompts that are too long for the model's context, before anything is sampled."""
    args, policy = run.args, run.learner.policy
    for number, row in enumerate(run.task.train_prompts):  # one by one, to save memory
        policy.encode_all(
            [row["prompt"]],
            max_completion_length=args.max_completion_length,
            truncate=args.truncate_prompts,
            first_row=number,
        )


def _one_step(run: Run, step: int) -> Record:
    began = time.perf_counter()
    prompts = run.stream.next()
    record = training_step(run.learner, run.rewards, run.running_mean, step, prompts, run.stream.take)
    record.metrics["epoch"] = run.stream.epoch
    record.metrics["learning_rate"] = run.schedule.get_last_lr()[0]
    record.metrics["skipped_steps"] = run.learner.skipped
    record.metrics["idle_steps"] = run.learner.idle
    rows = run.args.prompts_per_step * run.args.num_generations
    run.completion_tokens += record.metrics["completions/mean_length"] * rows
    run.timings.append(record.timings)
    run.steps = step
    run.tokens += int(record.metrics["num_tokens"])
    record.metrics["num_tokens"] = run.tokens
    run.latest, run.learner.generated = summed(run.learner.accelerator, run.learner.generated), 0
    run.samples += run.latest
    record.metrics["num_samples"] = run.samples
    run.set_rate()
    record.timings["step_seconds"] = time.perf_counter() - began
    run.step_seconds += record.timings["step_seconds"]
    return record


def _evaluate(run: Run, step: int) -> dict[str, float]:
    args, learner = run.args, run.learner
    found = evaluate_policy(
        learner.forward.policy,
        run.task.eval_prompts,
        run.rewards,
        replace(learner.sampling, num_generations=args.eval_generations, step=step),
        generator=learner.generator,
        accelerator=learner.accelerator,
        scoring=learner.forward.scoring,
        detailed=True,
        k=(args.eval_generations,) if args.eval_generations else (),
    )
    each = found.by_prompt
    run.means = [*run.means[:1], torch.tensor(each.get("reward", each["reward_greedy"])).double()]
    if step == 0:
        run.rows = [{"step": 0, **{f"eval_{name}": value for name, value in found.metrics.items()}}]
    return found.metrics


@contextmanager
def memory_needed() -> Iterator[None]:
    """Say in words that the memory did not suffice, and which settings bound it.

    Raises:
        Stopped: an allocation failed.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # Without a GPU torch raises an error of no kind of its own.
        kinds = (torch.OutOfMemoryError, MemoryError)
        if not isinstance(error, kinds) and "DefaultCPUAllocator" not in str(error):
            raise
        raise Stopped(
            "There is too little memory. In updates, give fewer --tokens-per-pass (config.json has their "
            "number) or a --micro-batch-size; in sampling, a --sampling-batch-size. --gradient-checkpointing "
            f"and --mixed-precision bf16 take less too. PyTorch said: {describe(error)}"
        ) from error


def _largest(accelerator: Any, numbers: Sequence[int]) -> Sequence[int]:
    """Return for each number the largest that a process gives, the same on each of them."""
    if accelerator.num_processes == 1:  # asked before every step: one process need not wait for its device
        return numbers
    with others_needed():
        gathered = accelerator.gather(torch.tensor([numbers], device=accelerator.device))
    found: list[int] = gathered.amax(0).tolist()
    return found
