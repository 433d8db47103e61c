"""The loop around the training step: evaluate, record, save, stop. There is one loop and no trainer class."""

from __future__ import annotations

import math
import time
from typing import Any

from tokenrl.core.baselines import RunningMean
from tokenrl.errors import Refused, Stopped
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.tasks.task import find_task
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.language.training.difficulty import filter_task
from tokenrl.language.training.evaluation import Evaluation, evaluate_policy
from tokenrl.language.training.kl_control import check_target
from tokenrl.language.training.recording import (
    Run,
    RunResult,
    config,
    facts,
    failed,
    finish,
    record_step,
    result,
    save_run,
)
from tokenrl.language.training.setup import arguments, make_accelerator, make_learner, make_policy, resolve
from tokenrl.language.training.step import Record, training_step
from tokenrl.runs.console import Console
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.metrics import MetricsLog
from tokenrl.runs.signals import GracefulStop


def train(args: TrainArguments | None = None, **options: Any) -> RunResult:
    """Train a language model by policy gradients; the keywords are the fields of `TrainArguments`.

    Objects may stand where the command line takes names: `model` a directory, a hub name, a `(model,
    tokenizer)` pair or a `Policy`; `task` a name or a task object; `reward` one function or several;
    `estimator` a preset's name or an `Estimator`.

    Raises:
        Refused: something was unusable before the first step.
        Stopped: the run could not go on; what was saved stays.

    Example:
        >>> import tokenrl
        >>> result = tokenrl.train(task="sort_digits", estimator="rloo", output_dir="runs/a")
        >>> result.eval_after["reward_greedy"]
    """
    args = args or arguments(TrainArguments, options)
    task, rewards = find_task(args)
    args = resolve(args, task)
    check_target(args)
    accelerator = make_accelerator(args)
    main = accelerator.is_main_process
    console = Console(
        quiet=args.quiet or not main, every=args.logging_steps if args.logging_steps > 1 else 10
    )
    directory = RunDirectory.create(args.output_dir, overwrite=args.overwrite) if main else None
    try:
        with accelerator.main_process_first():
            policy = make_policy(args, task, console.note)
        learner, schedule = make_learner(args, policy, accelerator)
        task = filter_task(
            task,
            policy,
            rewards,
            within=args.filter_difficulty,
            samples=args.filter_samples,
            announce=console.note,
            max_completion_length=args.max_completion_length or 256,
            temperature=args.temperature,
            seed=args.seed,
            truncate_prompts=args.truncate_prompts,
            accelerator=accelerator,
        )
        estimator = args.estimator
        run = Run(
            args=args,
            task=task,
            rewards=rewards,
            learner=learner,
            schedule=schedule,
            stream=PromptStream(task.train_prompts, args.prompts_per_step or 1, args.seed),
            running_mean=RunningMean(estimator.running_mean_decay, estimator.running_mean_init),
            console=console,
            directory=directory,
        )
        return _run(run)
    finally:
        if directory is not None:
            directory.release()


def _run(run: Run) -> RunResult:
    args, console = run.args, run.console
    console.start(f"tokenrl train: {run.task.name}", facts(run))
    began = time.monotonic()
    with GracefulStop(quiet=args.quiet or run.directory is None) as stop:
        before = _first_evaluation(run)
        if args.check:
            console.note(
                "Check passed: model, data, sampling, rewards and estimator work together. Nothing trained."
            )
            return result(run, "check", 0, before, before, began)
        if run.directory is not None:
            run.directory.begin()
            run.directory.write_config(config(run))
            run.log = MetricsLog(run.directory.metrics, run.directory.timings)
            run.log.write(0, {"eval_" + name: value for name, value in before.metrics.items()})
        _start_trackers(run)
        try:
            after = _loop(run, before, stop)
        except Stopped as error:
            raise failed(run, error, before, began) from error
    done = "finished" if run.step == args.max_steps else "learnt"
    reason = {143: "SIGTERM", 130: "SIGINT"}.get(stop.exit_code, done)
    ended = result(run, reason, stop.exit_code, before, after, began)
    finish(run, ended)
    return ended


def _first_evaluation(run: Run) -> Evaluation:
    """Evaluate before training; what cannot be sampled or rewarded is refused here, with nothing written."""
    args, policy = run.args, run.learner.policy
    for number, row in enumerate(run.task.train_prompts):  # one by one: their ids need not all be in memory
        policy.encode_all(
            [row["prompt"]],
            max_completion_length=args.max_completion_length or 256,
            truncate=args.truncate_prompts,
            first_row=number,
        )
    try:
        return _evaluate(run)
    except Stopped as error:
        raise Refused(f"Before the first step: {error}") from error


def _loop(run: Run, before: Evaluation, stop: GracefulStop) -> Evaluation:
    """Train to the last step or the first signal; returns the evaluation of the outcome, if there is one."""
    args, evaluation, evaluated = run.args, before, 0
    with run.console.progress(args.max_steps or 0) as progress:
        while run.step < (args.max_steps or 0) and not _requested(run, stop):
            record = _one_step(run)
            metrics = dict(record.metrics)
            last = run.step == args.max_steps
            if last or (args.eval_every and run.step % args.eval_every == 0):
                evaluation, evaluated = _evaluate(run), run.step
                metrics |= {"eval_" + name: value for name, value in evaluation.metrics.items()}
            record_step(run, record, metrics, progress)
            if args.save_every and run.step % args.save_every == 0:
                save_run(run)
            if _watch(run, metrics, before):
                break
    if evaluated == run.step:
        return evaluation
    # Who sends a signal waits for the run to be saved, not for an evaluation.
    return Evaluation({}, []) if stop.requested else _evaluate(run)


def _one_step(run: Run) -> Record:
    began = time.perf_counter()
    prompts = run.stream.next()
    record = training_step(run.learner, run.rewards, run.running_mean, run.step + 1, prompts, run.stream.take)
    run.step += 1
    record.metrics["epoch"] = run.stream.epoch
    record.metrics["learning_rate"] = run.schedule.get_last_lr()[0]
    record.metrics["skipped_steps"] = run.learner.skipped
    run.schedule.step()
    rows = (run.args.prompts_per_step or 1) * (run.args.num_generations or 1)
    run.completion_tokens += record.metrics["completions/mean_length"] * rows
    run.entropies.append(record.metrics["entropy"])
    run.tokens += int(record.metrics["num_tokens"])
    record.metrics["num_tokens"] = run.tokens
    run.step_seconds += time.perf_counter() - began
    return record


def _evaluate(run: Run) -> Evaluation:
    args, learner = run.args, run.learner
    with learner.accelerator.autocast():
        return evaluate_policy(
            learner.policy,
            run.task.eval_prompts,
            run.rewards,
            max_completion_length=args.max_completion_length or 256,
            num_generations=args.eval_generations,
            temperature=args.temperature,
            seed=args.seed,
            step=run.step,
            truncate_prompts=args.truncate_prompts,
            accelerator=learner.accelerator,
            detailed=True,
            k=(args.eval_generations,) if args.eval_generations else (),
        )


def _requested(run: Run, stop: GracefulStop) -> bool:
    """Whether any process was asked to stop; all must agree, or one would wait for the others for ever."""
    accelerator = run.learner.accelerator
    if accelerator.num_processes == 1:
        return stop.requested is not None
    import torch

    mine = torch.tensor(float(stop.requested or 0), device=accelerator.device)
    number = int(accelerator.gather(mine[None]).max())
    stop.requested = number or None
    return number > 0


def _watch(run: Run, metrics: dict[str, float], before: Evaluation) -> bool:
    """Warn of what makes learning impossible; whether the run is over because nothing is left to learn.

    Raises:
        Stopped: for many steps there was nothing to learn from, and the reward is no better than before.
    """
    args = run.args
    groups = args.estimator.needs_groups
    flat = metrics["frac_reward_zero_std"] == 1 if groups else metrics["reward_std"] == 0
    run.flat_steps = run.flat_steps + 1 if flat else 0
    differ = f"no two completions of {'a prompt' if groups else 'the step'} differ in reward"
    better = metrics["reward"] > before.metrics.get("reward", math.inf)
    if run.flat_steps and not better:
        _warn_once(
            run,
            f"step {run.step}: {differ}, so there is nothing to learn from. Is the task too hard for this "
            "policy, or the reward constant?",
            "flat",
        )
    if args.stop_after_zero_spread and run.flat_steps >= args.stop_after_zero_spread:
        if better:
            run.console.note(f"In {run.flat_steps} steps in a row {differ}: the task is learnt.")
            return True
        raise Stopped(
            f"In {run.flat_steps} steps in a row {differ}: nothing is being learnt. Use prompts that the "
            "policy sometimes solves, a graded reward, or more generations a prompt; "
            "stop_after_zero_spread=0 lets such a run go on."
        )
    if metrics["completions/clipped_ratio"] == 1:
        _warn_once(
            run,
            f"step {run.step}: every completion was cut at {args.max_completion_length} tokens before an "
            "EOS. Raise max_completion_length, or start from a model that ends its answers.",
            "cut",
        )
    return False


def _warn_once(run: Run, message: str, topic: str) -> None:
    if topic not in run.warned:
        run.warned.add(topic)
        run.console.warn(message)


def _start_trackers(run: Run) -> None:
    if not run.args.report_to:
        return
    try:
        run.learner.accelerator.init_trackers(
            "tokenrl", config={"task": run.task.name, "seed": run.args.seed}
        )
    except (
        Exception
    ) as error:  # a tracker that is offline must not cost the run; metrics.jsonl has everything
        run.learner.accelerator.trackers = []
        run.console.warn(f"no tracker was started ({error}); metrics.jsonl is written all the same.")
