"""Trains a language model: prepares a run, loops over steps, evaluations and checkpoints, and finishes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

from tokenrl.core.schedules import policy_steps, set_rates, share_of_rate
from tokenrl.errors import Finished, Refused, Stopped
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.language.policy.arguments import LoadingArguments, fill_form, form_line
from tokenrl.language.policy.loading import device_for
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.saved import SavedModel
from tokenrl.language.policy.saving import Card, fingerprint, save_policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.distribution import distribution_of
from tokenrl.language.rollout.rewarded import failures_of
from tokenrl.language.supervised import warm_start
from tokenrl.language.supervised.base import adapt, load_base, with_own_weights
from tokenrl.language.tasks.records import described, provenance_of, recorded
from tokenrl.language.tasks.rows import digits
from tokenrl.language.tasks.stream import prompt_stream
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.training.arguments import KlArguments, TrainArguments
from tokenrl.language.training.check import check_run
from tokenrl.language.training.experience import examples
from tokenrl.language.training.learner import make_learner
from tokenrl.language.training.logged import logged_groups
from tokenrl.language.training.run import RunResult, TrainingRun, warnings_of
from tokenrl.language.training.settings import (
    evaluates,
    first_facts,
    model_facts,
    settle,
    task_of,
)
from tokenrl.language.training.step import Record, training_step
from tokenrl.language.training.teacher import teacher_of
from tokenrl.language.training.verdicts import end_by_user, judge_end, judge_start, judge_step
from tokenrl.runs.metrics import write_completions
from tokenrl.runs.origin import repetition
from tokenrl.runs.processes import agreed, gather_objects, local, make_accelerator
from tokenrl.runs.resume import Provenance, check_processes, resume_settings, together
from tokenrl.runs.session import Session
from tokenrl.runs.threads import choose_threads, using_threads
from tokenrl.settings import part_of
from tokenrl.user_code import own_process

Callback = Callable[[int, dict[str, float]], object]


@takes(TrainArguments)
def train(
    args: TrainArguments | None = None, *, callback: Callback | None = None, **options: Any
) -> RunResult:
    """Train a language model by policy gradients; the keywords are the fields of `TrainArguments`.

    Where the command line takes names, the keywords also take objects: `model` and `teacher` a directory, a
    hub name, a `(model, tokenizer)` pair or a `Policy`; `task` a name, a task object, or data; `reward` one
    function or several; `estimator` a preset's name or an `Estimator`.

    Data is a `datasets.Dataset`, a list of rows (dicts), or a dict of splits such as a `DatasetDict`. A row
    has a `prompt`, text or chat messages, and its other columns reach the reward as lists. If it has a whole
    conversation in `messages` instead, a last turn of the assistant becomes the column `answer`. The splits
    train and validation or test become training and held-out prompts; data without splits is divided, as
    `eval_size` says. The run's config.json describes data but does not hold it.

    Args:
        args: all arguments at once, instead of keywords.
        callback: called after each step, in each process, with the number of the step and its row of
            metrics.jsonl; an evaluation that is made only because the run ends comes later. If it returns True
            (in any process) the run ends, with the exit reason `callback`; `resume="auto"` continues it. So it
            does if it raises `Finished`, with the exit reason `finished`.
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
    if callback is not None and not callable(callback):
        raise Refused(
            f"callback was given as {callback!r}; it must be a function of a step and its metrics."
        )
    args = arguments_of_call(TrainArguments, args, options)
    choices = fill_form(resume_settings(args, "train"))
    accelerator = make_accelerator(choices.cpu)
    check_processes(accelerator, vars(choices))
    every = choices.logging_steps if choices.logging_steps > 1 else 10
    with Session("train", choices, every=every, accelerator=accelerator) as session:
        run, provenance = _prepare(choices, session, options)
        threads = using_threads(run.args.threads)
        with closing(run.learner.generator), threads, own_process():
            _open(run, session, provenance)
            for warning in warnings_of(run):
                session.console.warn(warning)
            if run.args.check:
                return check_run(run, session)
            for step in _steps(run, session):
                try:
                    with session.update():
                        record = _one_step(run, step)
                except Finished as end:
                    session.step -= 1
                    session.end("finished", str(end))
                    continue
                metrics = dict(record.metrics)
                if session.due(run.args.eval_every):
                    metrics |= _evaluated(run, session)
                _record(run, session, record, metrics)
                if policy_steps(run.args, step) == 2:
                    session.console.note(run.forecast_duration(session.step_seconds))
                end_by_user(callback, metrics, session, record.ends)
                judge_step(run, session)
            return _finish(run, session)


def _warm_start(
    args: TrainArguments, task: PromptTask, rewards: Rewards, policy: Policy, session: Session
) -> dict[str, Any]:
    """Make the warm start in the main process, unless it has been made; return its facts in each process.

    The policy has its weights afterwards, and asks at its time where no other is set.
    """
    if not args.warm_start:
        return {}
    folder = session.output_dir / "warm_start"
    make = partial(warm_start.warm_start, args, task, rewards, folder, policy)
    facts = together(session.accelerator, make if session.main else dict)
    warmed: dict[str, Any] = gather_objects([facts])[0]
    if not warmed:
        return {}
    session.console.note(f"warm start: {warmed['in_words']}.")
    if warmed.get("chat_time") and args.chat_time is None:
        policy.ask(replace(policy.form, chat_time=warmed["chat_time"]))
    # Where the folder is on another machine, the main process sends its weights.
    if warmed["updates"] and folder.exists():
        warm_start.start_from(policy, folder)
    return warmed


def _prepare(
    choices: TrainArguments, session: Session, keywords: Collection[str]
) -> tuple[TrainingRun, Provenance]:
    """Load task and policy and settle the settings; return the run with its learner, and what it is made from."""
    console = session.console
    accelerator = session.accelerator
    processes = accelerator.num_processes
    read_task = partial(task_of, choices, processes, keywords)
    choices, origins, task, rewards, prompts, log = together(accelerator, read_task)
    facts = first_facts(choices, origins, session.directory, task, rewards)
    console.start(f"tokenrl train: {task.name}", facts)
    with accelerator.main_process_first():
        console.note("loading the model ...")
        policy = load_base(choices, task, console.note)
        kl, loading = part_of(choices, KlArguments), part_of(choices, LoadingArguments)
        policy, teacher = teacher_of(kl, loading, policy, prompts)
        if choices.check:
            policy = with_own_weights(policy, choices.model)
        if device_for(policy.size, choices.cpu).type != accelerator.device.type:
            accelerator = make_accelerator(cpu=True)  # there is one process, as on a Mac
    settling = partial(settle, choices, task, policy, origins, bool(rewards.keepers), processes)
    plan = together(accelerator, settling)
    console.facts("", model_facts(plan, policy, teacher))
    base = {"base model": fingerprint(policy.model)} if choices.warm_start else {}
    warmed = _warm_start(plan.args, task, rewards, policy, session)
    rows = {"train": task.train_prompts, "eval": task.eval_prompts}
    provenance = provenance_of(policy, rows, accelerator, task)
    adapt(choices, policy)
    if log is not None:
        provenance.fingerprints["rows"] = described({"train": log})[0]
        provenance.trained_prompts |= {*digits(log.keys.ravel())}
    if teacher is not None and teacher.fingerprint:
        provenance.fingerprints["teacher"] = teacher.fingerprint
    provenance.chosen = {**provenance.fingerprints, **(base if warmed else {})}
    threads, reason = choose_threads(policy.size, choices.threads)
    decided = {"threads": threads, "chat_time": policy.form.chat_time}
    facts = {**provenance.fingerprints, "size of the model": policy.size}
    check_processes(accelerator, {**vars(plan.args), **decided, **facts})
    console.note("checking that this model is sampled and scored rightly ...")
    with using_threads(threads):
        turns = rewards.environments is not None
        options: dict[str, Any] = {"rows": chain(*rows.values()), "turns": turns, **decided}
        learner = make_learner(plan.args, policy, accelerator, teacher, **options)
    if not learner.generator.abilities.exact:
        provenance.caveats.append(f"{learner.engine} has random numbers of its own")
    if log is not None:
        learner.log = together(
            accelerator, partial(logged_groups, log, learner, rewards, console.note)
        )
    draws = choices.seed, choices.prompt_weights, choices.prompt_floor
    split = "eval" if choices.control_arm == "best_of_n" else "train"
    run = TrainingRun(
        plan=plan,
        task=task,
        rewards=rewards,
        learner=learner,
        stream=prompt_stream(rows[split], *draws),
        memory=learner.estimator.memory(),
        threads=f"{threads} ({reason})",
        teacher=teacher,
        warm_started=warmed,
    )
    return run, provenance


def _open(run: TrainingRun, session: Session, provenance: Provenance) -> None:
    """Show the rest of the header, and restore the state of the checkpoint from which a run continues."""
    parts: Any = {"stream": run.stream, "memory": run.memory, "learner": run.learner}
    facts = {"solved": run.task.solved, **recorded(run.task)}
    if run.warm_started:
        facts["warm_started"] = run.warm_started
    if run.rewards.keepers:
        parts["rewards"] = run.rewards
    policy = run.learner.policy
    session.open(
        run.args,
        SavedModel(policy, distribution=distribution_of(run.args)),
        provenance,
        parts | {"run": run},
        run.facts(),
        names={
            "task": run.task.name,
            "model": policy.source,
            "teacher": run.teacher and run.teacher.name,
            "rows": provenance.fingerprints.get("rows"),
        },
        title=run.title,
        **facts,
    )


def _steps(run: TrainingRun, session: Session) -> Iterator[int]:
    """Evaluate the policy before training, unless the run continues; return the steps that are left.

    Raises:
        Refused: a prompt is too long for the model's context.
    """
    run.check_prompts()
    run.learner.sync()  # with the weights of the checkpoint, if there is one
    if not session.continues:
        _evaluated(run, session)
        judge_start(run, session)
    return session.steps()


def _one_step(run: TrainingRun, step: int) -> Record:
    """Make a training step, and add it to what the run has done so far.

    Raises:
        Finished: code of the user's ends the run; prompts and states of rewards are those before the step again.
    """
    learner = run.learner
    args = run.args
    run.tell(step - 1)
    moved = policy_steps(args, step - 1)
    in_all = policy_steps(args, args.max_steps)
    share = share_of_rate(args.lr_scheduler_type, moved, in_all, args.warmup_steps)
    set_rates(learner.optimizer, share)
    changes = args.estimator.zero_spread == "refill" or args.estimator.prompts != "uniform"
    are_known = not changes and run.rewards.environments is None
    if args.sync_every > 1 and are_known and step < args.max_steps:
        size = args.prompts_per_step
        following = run.stream.peek(2 * size)[size:]  # of the step after this
        agreed(learner.generator.announce)(local(learner.accelerator, following))
    parts: Any = run.stream, run.rewards, learner.log or run.stream
    before = [part.state_dict() for part in parts]
    try:
        record = training_step(learner, run.training_rewards, run.memory, step, run.stream)
    except Finished:
        for part, state in zip(parts, before, strict=True):
            part.load_state_dict(state)
        raise
    if not run.unrewarded:
        run.search.add(learner.policy, record.rewarded, step, run.totals["num_samples"])
    metrics = record.metrics
    done = {
        "num_tokens": int(metrics["num_tokens"]),
        "completion_tokens": metrics["completions/mean_length"] * args.completions,
        # A prompt that was replaced has its sampled completions; greedy ones are those of the others.
        "num_samples": run.sampled + args.num_generations * int(metrics.get("refilled", 0)),
    }
    seconds = {name: x for name, x in record.timings.items() if "seconds" in name}
    run.totals.update(done | seconds)
    metrics |= {
        "epoch": (learner.log or run.stream).epoch,
        "learning_rate": learner.optimizer.param_groups[0]["lr"],
        "skipped_steps": learner.skipped,
        "idle_steps": learner.idle,
        "num_tokens": run.totals["num_tokens"],
        "num_samples": run.totals["num_samples"],
    }
    return record


def _evaluated(run: TrainingRun, session: Session) -> dict[str, float]:
    """Evaluate the policy on the held-out prompts, and keep the mean reward of each, and what failed.

    The evaluation is recorded, and once it is said that episodes fail. The metrics of the step are returned.
    There are none where evaluations would spend what a reward counts, or where a reward ends the run in one,
    which then has the state from before it again.

    Raises:
        Stopped: every episode of the evaluation before the first step failed.
    """
    if not evaluates(run.args, run.rewards):
        return {}
    count, learner = run.args.eval_generations, run.learner
    if not session.step:
        held_out = len(run.task.eval_prompts)
        session.console.note(f"evaluating {held_out:,} prompts before the first step ...")
    run.tell(session.step)
    began = time.perf_counter()
    before = run.rewards.state_dict()
    try:
        evaluation = run.evaluator.evaluate(
            run.task.eval_prompts,
            run.rewards,
            replace(learner.sampling, num_generations=count),
            (count,) if count else (),
        )
    except Finished as end:
        run.rewards.load_state_dict(before)
        session.end("finished", str(end))
        return {}
    run.eval_seconds = time.perf_counter() - began
    means = evaluation.by_prompt
    if rewarded := means.get("reward", means.get("reward_greedy")):
        run.means = [*run.means[:1], rewarded]
    run.failures = evaluation.failures
    run.constant = evaluation.constant
    failed = failures_of(run.failures)
    if run.failures and all(run.failures) and not session.step:
        raise Stopped(f"There is nothing to learn from: {failed}")
    metrics = session.evaluated(run.metrics_of(evaluation))
    if failed:
        session.warn_once("evaluation-fails", f"evaluation after step {session.step}: {failed}")
    return metrics


def _record(run: TrainingRun, session: Session, record: Record, metrics: dict[str, float]) -> None:
    """Record a step's metrics, and write and show its completions.

    The metrics come last of what is written: with them a step is complete.
    """
    every = run.args.log_completions
    rows = []
    is_end = session.step in (1, run.args.max_steps)
    if session.main and every and (is_end or session.due(every)):
        rows = record.rows()
        write_completions(session.output_dir / "completions", session.step, rows)
    if failed := failures_of(record.failures):
        session.warn_once("environment-fails", f"step {session.step}: {failed}")
    if record.unread:
        session.warn_once("unread-tokens", f"step {session.step}: {record.unread}")
    rate = {"tokens_per_second": session.rate(run.totals["completion_tokens"])}
    session.record(metrics, record.timings | rate)
    if rows:
        session.console.completions_table(examples(rows, run.args.num_generations))


def _finish(run: TrainingRun, session: Session) -> RunResult:
    """Judge the run, save the model with its card, write summary and report, and show how the run ended."""
    if session.owes_evaluation:
        _evaluated(run, session)
    if late := run.rewards.late:
        session.console.warn(f"{late:,} completions got no reward, as it missed reward_timeout.")
    findings = judge_end(run, session)
    ended = run.result(session)
    facts = {"task": run.task.name, "base": ended.policy.source, "steps": ended.steps}
    if run.warm_started:
        facts["warm start"] = run.warm_started["in_words"]
    if run.teacher is not None:
        facts["teacher"] = run.teacher.name
    facts |= form_line(ended.policy.form)
    for moment, numbers in (("before", ended.eval_before), ("after", ended.eval_after)):
        rewards = [name for name in numbers if name.startswith("reward")]
        facts |= {f"{name} {moment}": numbers[name] for name in rewards}
    facts["weights"] = ended.weights
    card = Card(run.title, facts, repetition(session.command), run.args.model)
    distribution = distribution_of(run.args)
    save = partial(save_policy, ended.policy, card=card, distribution=distribution)
    session.finish(ended, save, findings)
    run.learner.accelerator.wait_for_everyone()
    return ended
