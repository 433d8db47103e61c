"""Checks a run before its first update (`--check`), and leaves its weights as they are.

A check looks at texts and settings, makes a few training steps and takes them back, evaluates the policy with
and without these steps, compares the log-probabilities of sampling and scoring, and prints every problem that
it finds. It shows a prompt as the model reads it, and completions with their rewards.
"""

from __future__ import annotations

import contextlib
import copy
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from rich.filesize import decimal

from tokenrl.errors import TokenrlError
from tokenrl.language.evaluation.evaluation import over_prompts, transcript
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.rewarded import failures_of, prompt_text
from tokenrl.language.rollout.sampling import encode
from tokenrl.language.tasks.held_out import smaller_evaluation
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.learner import Learner, make_optimizer
from tokenrl.language.training.rows import logprobs_under, sample
from tokenrl.language.training.run import RunResult, TrainingRun
from tokenrl.language.training.settings import sizes_of_steps
from tokenrl.language.training.step import Record, training_step
from tokenrl.language.training.texts import check_characters, check_demonstrations, usable_rows
from tokenrl.language.training.verdicts import asks_in_text, run_facts
from tokenrl.runs.console import conclude, number
from tokenrl.runs.findings import Finding, Weight, lower_rate, share_equal
from tokenrl.runs.metrics import peak_memory
from tokenrl.runs.output import harmless, visible
from tokenrl.runs.rules import MIN_ERRORS, judge
from tokenrl.runs.session import Session

FEW_PROMPTS = 8
"""Of fewer held-out prompts the error of a mean is too uncertain to say that a reward has fallen."""
T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]
Evaluate = Callable[[TrainingRun], Mapping[str, float]]

SHARE = 20
"""A check makes at most one in so many of the steps and evaluations of the run, but for the least numbers."""
LEAST, ENOUGH, MOST_STEPS = 32, 128, 8
"""If no rewards differ, trial steps are repeated up to the first number of completions in any run, and up to
the other number and so many steps in a long one. Then it is said that there is nothing to learn."""
LEAST_PROMPTS = 16
"""Fewest held-out prompts that are evaluated, if there are as many."""
SHOWN, LONGEST_SHOWN = 4, 1000
"""Completions that are shown, and characters of the prompt."""


def check_run(run: TrainingRun, session: Session, evaluate: Evaluate) -> RunResult:
    """Check a run whose parts are ready, print what was found, and return the result.

    The work is bounded by the length of the run (see `_extent`), and does not depend on the machine's speed.

    Args:
        run: the run. Its weights are as they were at the end, bit for bit.
        session: the session, which has been opened.
        evaluate: evaluates the policy of a run on its held-out prompts, as before the first step.

    Returns:
        The result, with exit code 2 if there is a problem, else 0; its `flags` name problems and remarks.
    """
    findings: list[Finding] = []
    gap: dict[str, float] = {}
    train = usable_rows(run, run.task.train_prompts, "training prompts", findings)
    held_out = usable_rows(run, run.task.eval_prompts, "held-out prompts", findings)
    check_demonstrations(run, findings)
    characters = check_characters(run, findings)
    records, smaller = _try_out(run, session, evaluate, train, len(held_out), findings)
    if records:
        gap = _attempt(findings, "scoring-failed", lambda: _scoring_gap(run, train)) or {}
    failures = [*run.failures, *(text for record in records for text in record.failures)]
    if failed := failures_of(failures):
        findings.append(Finding("environment-fails", "void", failed))
    unread = [record.unread for record in records if record.unread and not run.warm_seconds]
    findings += [Finding("unread-tokens", "watch", text) for text in unread[:1]]
    observed = _trial_facts(run, records, session) | gap
    # A remark on a value that was left to tokenrl would contradict tokenrl's own choice.
    settings = {"truncation": "max_completion_length"}
    if observed["is_half"]:
        settings["sampling-differs"] = "mixed_precision"
    left_open = {
        flag for flag, name in settings.items() if run.settings.origins.get(name) != "given"
    }
    findings += [f for f in judge(observed) if f.weight != "watch" or f.flag not in left_open]
    lines = _lines(run, observed, records) | _judge_steps(smaller, observed, findings)
    lines["unknown"] = characters
    if records:
        held_out_prompts = _share_of_prompts(run, len(smaller.task.eval_prompts))
        lines["checked"] = f"{len(records)} of {run.args.max_steps} steps, {held_out_prompts}"
        timings = records[-1].timings
        lines["time"] = run.forecast_duration(timings["collect"] + timings["update"])
        _show_completions(run, session, records[0])
    if run.rewards.environments is None:  # else the first episode shows it
        lines["prompt"] = _rendered(run, records, train)
    lines["disk"] = f"{decimal(shutil.disk_usage(session.output_dir).free)} are free"
    code = conclude(session, "model, data, sampling, rewards and estimator", lines, findings)
    session.ended = "check"
    result = run.result(session)
    return replace(result, exit_code=result.exit_code or code)


def _try_out(
    run: TrainingRun,
    session: Session,
    evaluate: Evaluate,
    train: Rows,
    usable: int,
    findings: list[Finding],
) -> tuple[list[Record], TrainingRun]:
    """Make trial steps, evaluate after them, take them back, and evaluate as before the first step.

    Args:
        run: the run.
        session: the session, which records the evaluation without the steps.
        evaluate: evaluates the policy of a run on its held-out prompts.
        train: the training prompts that the policy can complete.
        usable: the number of held-out prompts that it can complete.
        findings: problems and remarks, to which failures are added.

    Returns:
        The records of the steps, and the run with fewer held-out prompts and its evaluations.
    """
    least, most, size = _extent(run)
    smaller = replace(run, task=smaller_evaluation(run.task, size), means=[])
    can_evaluate = usable == len(run.task.eval_prompts)
    records: list[Record] = []

    def evaluated() -> Mapping[str, float]:
        if not can_evaluate or any(finding.flag == "evaluation-failed" for finding in findings):
            return {}
        return _attempt(findings, "evaluation-failed", lambda: evaluate(smaller)) or {}

    prompts = _share_of_prompts(run, size)
    with _weights_restored(run.learner):
        if train:
            with session.console.status("making training steps, which are taken back"):
                records = _trial_steps(run, train, (least, most), findings)
        if records and not run.warm_seconds:  # else the steps were made for their time alone
            with session.console.status(f"evaluating {prompts}, with these steps"):
                evaluated()
    if records or not train:
        with session.console.status(f"evaluating {prompts}, as before the first step"):
            session.evaluated(evaluated())
        run.eval_seconds = smaller.eval_seconds * usable / size
        run.failures = smaller.failures
    return records, smaller


def _share_of_prompts(run: TrainingRun, size: int) -> str:
    """Return in words on how many of the held-out prompts a check evaluates."""
    return f"{size:,} of {len(run.task.eval_prompts):,} held-out prompts"


def _extent(run: TrainingRun) -> tuple[int, int, int]:
    """Return the least and the most trial steps and the held-out prompts: a twentieth of the run, or few."""
    size = sizes_of_steps(run.args)[0]
    share = run.args.max_steps // SHARE
    least = min(3, max(share, 1))  # the first two steps are slower than later ones
    most = max(share, math.ceil(LEAST / size))
    most = min(most, MOST_STEPS, math.ceil(ENOUGH / size))
    held_out = len(run.task.eval_prompts)
    prompts = max(run.num_evaluations * held_out // SHARE, LEAST_PROMPTS)
    return least, most, min(held_out, prompts)


@contextlib.contextmanager
def _weights_restored(learner: Learner) -> Iterator[None]:
    """Let a block train the policy, and give it the weights back that it had before."""
    parameters = learner.policy.trainable_parameters()
    copies = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, copy_before in zip(parameters, copies, strict=True):
                parameter.copy_(copy_before)
        learner.sync()


def _judge_steps(
    run: TrainingRun, observed: Mapping[str, Any], findings: list[Finding]
) -> dict[str, str]:
    """Compare the held-out rewards after and before the trial steps, and add a finding if they have fallen.

    Returns:
        A line of the table, if both were evaluated.
    """
    if len(run.means) < 2 or run.unrewarded:
        return {}
    after, before = map(fmean, run.means)
    gains = [now - then for now, then in zip(*run.means, strict=True)]
    gain, error = over_prompts(gains)
    if -gain > 2 * error and len(gains) >= FEW_PROMPTS:
        text = f"The trial steps lower the held-out reward from {before:.3g} to {after:.3g}. "
        advice, changes = lower_rate(observed)
        weight: Weight = "void" if -gain > MIN_ERRORS * error else "watch"
        findings.append(Finding("reward-falls", weight, text + advice, changes))
    return {"held out": f"reward {before:.3g}, {after:.3g} after the trial steps"}


def _rendered(run: TrainingRun, records: Sequence[Record], rows: Rows) -> str:
    """Return a prompt as the model reads it, special tokens included; empty if there is none."""
    policy = run.learner.policy
    shown = records[0].rows() if records else rows
    if not shown:
        return ""
    (ids,) = encode(policy, [shown[0]], run.learner.sampling)
    text = policy.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return visible(text, LONGEST_SHOWN)


def _show_completions(run: TrainingRun, session: Session, record: Record) -> None:
    """Print the first completions of a trial step with each reward, unless a warm start comes before."""
    if run.warm_seconds:
        return
    rows = [row | {"prompt": prompt_text(row["prompt"])} for row in record.rows()[:SHOWN]]
    names = ["reward"]
    if len(run.rewards.names) > 1:
        names = [*(f"rewards/{name}" for name in run.rewards.names), "reward"]
    session.console.completions_table(rows, names)
    if run.rewards.environments is not None:
        first = rows[0]
        parts = transcript(first["prompt"], first["messages"], first["ending"], first["failure"])
        session.console.note(f"The first episode, of reward {number(first['reward'])}:")
        session.console.note(harmless(parts))


def _attempt(findings: list[Finding], flag: str, work: Callable[[], T]) -> T | None:
    """Do some work and return what it returns; if it fails, add a finding and return None."""
    try:
        return work()
    except TokenrlError as error:
        findings.append(Finding(flag, "void", f"{error} Training would stop at the same error."))
        return None


def _trial_steps(
    run: TrainingRun, rows: Rows, extent: tuple[int, int], findings: list[Finding]
) -> list[Record]:
    """Make training steps at the full learning rate: the least, and more without a signal, up to the most."""
    learner = run.learner
    records = list[Record]()
    rewards = run.training_rewards
    if run.warm_seconds:  # before a warm start the steps are made for their time alone
        rewards = Rewards([_ranks], environments=rewards.environments)
    stream = PromptStream(rows, run.args.seed)
    optimizer = make_optimizer(run.args, learner.policy)

    def step() -> Record:
        critic, memory = copy.deepcopy((learner.critic, run.memory))
        trial = replace(learner, optimizer=optimizer, critic=critic)
        return training_step(trial, rewards, memory, len(records) + 1, stream.draw_prompts)

    least, most = extent
    while len(records) < least or (len(records) < most and _share_equal(run, records) == 1):
        record = _attempt(findings, "step-failed", step)
        learner.optimizer.zero_grad()
        if record is None:
            break
        records.append(record)
    return records


def _ranks(completions: Sequence[str], **_: Any) -> Sequence[float]:
    """A reward that differs within every group."""
    return [*range(len(completions))]


def _share_equal(run: TrainingRun, records: Sequence[Record]) -> float:
    """Return the share of groups with equal rewards; without groups 1 if all steps have one reward."""
    groups = run.args.estimator.needs_groups
    if not groups and len({record.metrics.get("reward") for record in records}) > 1:
        return 0.0
    return fmean([share_equal(record.metrics, groups) for record in records])


def _scoring_gap(run: TrainingRun, rows: Rows) -> dict[str, float]:
    """Sample a few completions and score them as training does; return how far apart tokens are, as facts."""
    learner = run.learner
    sampling = replace(
        learner.sampling, num_generations=min(4, learner.sampling.group_size), step=1
    )
    rollout = sample(learner, list(enumerate(rows[:4])), sampling, run.rewards.environments)
    scored = logprobs_under(learner, learner.forward.model, rollout)
    apart = (scored - rollout.sampling_logprobs)[rollout.mask].double().abs()
    return {"gap": float(apart.mean()), "largest_gap": float(apart.max())}


def _trial_facts(run: TrainingRun, records: Sequence[Record], session: Session) -> dict[str, Any]:
    """Return the facts of a check: of its trial steps, if any, and of the evaluation before training."""
    args = run.args
    policy = run.learner.policy
    usual = run.settings.usual_rate
    numbers = {"whose": "this model", "lowest_rate": usual, "highest_rate": usual}
    numbers["is_half"] = run.decided["mixed_precision"] == "bf16"
    if not records or run.warm_seconds:  # before a warm start, what the model writes says nothing
        return run_facts(run, [], **numbers)
    equal = _share_equal(run, records)
    size = args.num_generations
    groups = len(records) * args.prompts_per_step
    if size == 1:
        groups = len(records)
        size = args.prompts_per_step
    numbers |= {
        "step_equal": equal,
        "is_misasked": asks_in_text(run) or equal == 1,
        "steps_without_signal": len(records) if equal == 1 else 0,
        "others_differ": args.teacher is not None,
        "groups": f"{_counted(groups, 'group')} of {_counted(size, 'completion')}",
        "who": "The greedy completions of held-out prompts",
        "before_greedy": session.eval_before.get("reward_greedy") if equal < 1 else None,
    }
    if run.rewards.environments is not None:  # a turn that was cut off is never acted on
        cut = fmean(record.metrics["completions/clipped_ratio"] for record in records)
        numbers["recent_cut"] = cut if cut < 1 else None  # the rule truncation says that
    if not any(math.isfinite(record.metrics["grad_norm"]) for record in records):
        numbers["step_grad_norm"] = math.inf
    if not (policy.eos_ids or policy.stops):  # then all are cut
        numbers["step_cut"] = None
    steps = [{"step": 1, **record.metrics} for record in records]
    return run_facts(run, [*session.rows, *steps], "step", **numbers)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _lines(
    run: TrainingRun, observed: Mapping[str, Any], records: Sequence[Record]
) -> dict[str, str]:
    """Return the lines of the table: what was measured."""
    args = run.args
    lines = {}
    if records and not run.warm_seconds:
        if not run.unrewarded:
            share = f"{1 - observed['step_equal']:.0%} of {observed['groups']}"
            lines["reward"] = f"{observed['step_reward']:.3g} on average; differs within {share}"
        length = fmean(record.metrics["completions/mean_length"] for record in records)
        cut = fmean(record.metrics["completions/clipped_ratio"] for record in records)
        cut_at = f"{cut:.0%} cut at {args.max_completion_length}"
        lines["completions"] = f"{length:.1f} tokens on average; {cut_at}"
    if "gap" in observed:
        apart = f"{observed['gap']:.1g} nats per token on average, {observed['largest_gap']:.1g} at most"
        lines["scoring"] = f"differs from sampling by {apart}"
    memory = []
    for name, size in peak_memory().items():
        machine = "GPU" if "cuda" in name else "computer"
        memory.append(f"{decimal(int(size * 1024**3))} of the {machine} so far")
    lines["memory"] = ", ".join(memory)
    return lines
