"""Judges a run by the rules about numbers (`runs.rules`): before its first update, at each step, at its end.

A check (`--check`) looks at texts and settings, evaluates the policy, makes training steps that change
nothing, compares the log-probabilities of sampling and scoring, and prints every problem that it finds.
During a run and at its end it is said whether the updates have destroyed the policy, whether there is
anything to learn from, and whether anything was learnt.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from rich.filesize import decimal

from tokenrl.core.statistics import GradientDiagnostics
from tokenrl.errors import Refused, Stopped, TokenrlError, with_places
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.stream import PromptStream
from tokenrl.language.training.collect import logprobs_under, sample
from tokenrl.language.training.defaults import demonstrations, is_own
from tokenrl.language.training.evaluation import over_prompts
from tokenrl.language.training.run import RunResult, TrainingRun
from tokenrl.language.training.step import Record, training_step
from tokenrl.language.training.supervised import encode_demonstrations
from tokenrl.runs.findings import Finding, Part, conclude, facts, share_equal
from tokenrl.runs.metrics import peak_memory
from tokenrl.runs.reader import finite
from tokenrl.runs.rules import judge
from tokenrl.runs.session import Session

T = TypeVar("T")
Rows = Sequence[Mapping[str, Any]]

ENOUGH, MOST_STEPS = 128, 8
"""A check repeats trial steps up to so many completions or steps; if no rewards differ in any, it says
that there is nothing to learn."""
DEMONSTRATIONS = 512
"""Most demonstrations whose lengths are checked; more take longer and show the same."""
POLICY_LOST = ("policy-destroyed", "entropy-collapsed")
"""The flags of a policy that has been lost during a run."""


def check_run(run: TrainingRun, session: Session, evaluate: Callable[[], Mapping[str, float]]) -> RunResult:
    """Check a run whose parts are ready, print what was found, and return the result.

    Args:
        run: the run. Its weights stay as they are, bit for bit.
        session: the session, which has been opened.
        evaluate: evaluates the policy, as before the first step of a run.

    Returns:
        The result, with exit code 2 if there is a problem, else 0; its `flags` name problems and remarks.
    """
    findings, records = list[Finding](), list[Record]()
    train = _usable_rows(run, run.task.train_prompts, "training prompts", findings)
    held_out = _usable_rows(run, run.task.eval_prompts, "held-out prompts", findings)
    _check_demonstrations(run, findings)
    gap = None
    if len(held_out) == len(run.task.eval_prompts):
        with session.console.status(f"evaluating {len(held_out):,} prompts, as before the first step"):
            session.evaluated(_attempt(findings, "evaluation-failed", evaluate) or {})
    if train and not any(finding.flag == "evaluation-failed" for finding in findings):
        with session.console.status("trying training steps, which change no weight"):
            records = _trial_steps(run, train, findings)
        gap = _attempt(findings, "scoring-failed", lambda: _scoring_gap(run, train))
    observed = _trial_facts(run, records, session.eval_before) | (gap or {})
    findings += judge(observed)
    lines = _lines(run, observed, records)
    if records:
        seconds = records[-1].timings["collect"] + records[-1].timings["update"]
        lines["time"] = run.forecast_duration(seconds)
    lines["disk"] = f"{decimal(shutil.disk_usage(session.output_dir).free)} are free"
    code = conclude(session, "model, data, sampling, rewards and estimator", lines, findings)
    result = run.result(session, "check")
    return replace(result, exit_code=result.exit_code or code)


def _attempt(findings: list[Finding], flag: str, work: Callable[[], T]) -> T | None:
    """Do some work and return what it returns; if it fails, add a finding and return None."""
    try:
        return work()
    except TokenrlError as error:
        findings.append(Finding(flag, "void", f"{error} Training would stop at the same error."))
        return None


def _usable_rows(run: TrainingRun, rows: Rows, which: str, findings: list[Finding]) -> Rows:
    """Return the rows whose prompts the policy can complete, and add a finding about those that it cannot."""
    limit, cut = run.args.max_completion_length, run.args.truncate_prompts
    policy, usable, refused = run.learner.policy, list[Mapping[str, Any]](), list[str]()
    for name, row in with_places(rows):
        try:
            policy.encode_all([row["prompt"]], max_completion_length=limit, truncate=cut, places=[name])
            usable.append(row)
        except Refused as error:
            refused.append(f"The first is that of {name}. {error}")
    if refused:
        text = f"{len(refused):,} of {len(rows):,} {which} cannot be asked. {refused[0]}"
        findings.append(Finding("prompts-refused", "void", text))
    return usable


def _check_demonstrations(run: TrainingRun, findings: list[Finding]) -> None:
    """Add a finding about demonstrations that are longer than completions may be."""
    policy, limit = run.learner.policy, run.args.max_completion_length
    try:
        pairs = encode_demonstrations(policy, demonstrations(run.task)[:DEMONSTRATIONS])
    except Refused:  # there are none, or they are not used and do not fit
        return
    lengths = [len(completion) for _, completion in pairs]
    long = sum(length > limit for length in lengths)
    if long:
        text = (
            f"{long} of the first {len(lengths)} demonstrations have more than {limit} tokens; the longest "
            f"has {max(lengths)}. Such an answer is cut: give --max-completion-length {max(lengths)} or more."
        )
        findings.append(Finding("answers-too-long", "void" if 2 * long > len(lengths) else "watch", text))


def _trial_steps(run: TrainingRun, rows: Rows, findings: list[Finding]) -> list[Record]:
    """Make training steps that change nothing: three, and more until there is a signal or enough had none."""
    args, learner, records = run.args, run.learner, list[Record]()
    # Before a warm start the steps are made for their time alone.
    rewards = Rewards([_ranks]) if run.warm_seconds else run.rewards
    stream = PromptStream(rows, args.seed)
    still = torch.optim.SGD(learner.policy.trainable_parameters(), lr=0.0)
    enough = min(MOST_STEPS, math.ceil(ENOUGH / (args.prompts_per_step * args.num_generations)))

    def step() -> Record:
        critic, mean = copy.deepcopy((learner.critic, run.running_mean))
        trial = replace(learner, optimizer=still, critic=critic, diagnostics=GradientDiagnostics(0))
        return training_step(trial, rewards, mean, len(records) + 1, stream.draw_prompts)

    # The first two steps are slower than later ones.
    while len(records) < 3 or (len(records) < enough and _share_equal(run, records) == 1):
        record = _attempt(findings, "step-failed", step)
        learner.optimizer.zero_grad()
        if record is None:
            break
        records.append(record)
    return records


def _ranks(completions: Sequence[str], **_: Any) -> list[float]:
    """A reward that differs within every group."""
    return [float(index) for index in range(len(completions))]


def _share_equal(run: TrainingRun, records: Sequence[Record]) -> float:
    """Return the share of groups with equal rewards; without groups 1 if all steps have one reward."""
    groups = run.args.estimator.needs_groups
    if not groups and len({record.metrics["reward"] for record in records}) > 1:
        return 0.0
    return fmean([share_equal(record.metrics, groups) for record in records])


def _scoring_gap(run: TrainingRun, rows: Rows) -> dict[str, float]:
    """Sample a few completions and score them as training does; return how far apart tokens are, as facts."""
    learner = run.learner
    sampling = replace(learner.sampling, num_generations=min(4, learner.sampling.group_size), step=1)
    rollout = sample(learner, list(enumerate(rows[:4])), sampling)
    scored = logprobs_under(learner, learner.forward.model, rollout)
    apart = (scored - rollout.sampling_logprobs)[rollout.mask].double().abs()
    return {"gap": float(apart.mean()), "largest_gap": float(apart.max())}


def _trial_facts(run: TrainingRun, records: Sequence[Record], before: Mapping[str, float]) -> dict[str, Any]:
    """Return the facts of a check: of its trial steps, if any, and of the evaluation before training."""
    args, policy, usual = run.args, run.learner.policy, run.usual_rate
    numbers = {"whose": "this model", "lowest_rate": usual, "highest_rate": usual}
    numbers["is_half"] = args.mixed_precision == "bf16"
    if not records or run.warm_seconds:  # before a warm start, what the model writes says nothing
        return run_facts(run, [], **numbers)
    equal, size = _share_equal(run, records), args.num_generations
    groups = len(records) * args.prompts_per_step
    if size == 1:
        groups, size = len(records), args.prompts_per_step
    numbers |= {
        "step_equal": equal,
        "is_misasked": asks_in_text(run) or equal == 1,
        "steps_without_signal": len(records) if equal == 1 else 0,
        "groups": f"{groups} group{'s' * (groups != 1)} of {size} completion{'s' * (size != 1)}",
        "who": "The greedy completions of held-out prompts",
        "before_greedy": before.get("reward_greedy") if equal < 1 else None,
    }
    if not any(math.isfinite(record.metrics["grad_norm"]) for record in records):
        numbers["step_grad_norm"] = math.inf
    if not (policy.eos_ids or policy.stops):  # then all are cut
        numbers["step_cut"] = None
    return run_facts(run, [{"step": 1, **record.metrics} for record in records], "step", **numbers)


def _lines(run: TrainingRun, observed: Mapping[str, Any], records: Sequence[Record]) -> dict[str, str]:
    """Return the lines of the table: what was measured."""
    args, lines = run.args, {}
    if records and not run.warm_seconds:
        share = f"{1 - observed['step_equal']:.0%} of {observed['groups']}"
        lines["reward"] = f"{observed['step_reward']:.3g} on average; differs within {share}"
        length = fmean(record.metrics["completions/mean_length"] for record in records)
        cut = fmean(record.metrics["completions/clipped_ratio"] for record in records)
        cut_at = f"{cut:.0%} cut at {args.max_completion_length}"
        lines["completions"] = f"{length:.1f} tokens on average; {cut_at}"
    if "gap" in observed:
        apart = f"{observed['gap']:.1g} nats per token on average, {observed['largest_gap']:.1g} at most"
        lines["scoring"] = f"differs from sampling by {apart}"
    lines["memory"] = ", ".join(
        f"{decimal(int(size * 1024**3))} of the {'GPU' if 'cuda' in name else 'computer'} so far"
        for name, size in peak_memory().items()
    )
    return lines


def judge_step(run: TrainingRun, session: Session) -> str | None:
    """Warn of a step that destroys the policy or can teach nothing; return why the run ends now, or None.

    Raises:
        Stopped: in many consecutive steps there was nothing to learn from, and the reward is no better than
            before training.
    """
    step, reward = session.step, session.rows[-1]["reward"]
    observed = _step_facts(run, session)
    idle, findings = observed["steps_without_signal"], {f.flag: f for f in reversed(judge(observed))}
    lost = [flag for flag in POLICY_LOST if flag in session.flags]
    if not lost and (new := [flag for flag in POLICY_LOST if flag in findings]):
        lost = new[:1]
        session.flags += lost
        session.console.warn(f"step {step}: {findings[lost[0]].text}")
    for flag in ("all-truncated", "slow-reward"):
        if flag in findings:
            session.warn_once(flag, f"step {step}: {findings[flag].text}")
    if (none := findings.get("no-signal")) is None:
        return None
    ends = 0 < run.args.stop_after_zero_spread <= idle
    if reward > session.eval_before.get("reward", math.inf):
        return _end_of_learning(run, session, idle) if ends else None
    if not lost:
        session.warn_once("flat", f"step {step}: {none.text}")
    if ends:
        cause = next((findings[flag] for flag in lost if flag in findings), none)
        session.flags = session.flags or ["nothing-learnt"]
        raise Stopped(f"{cause.text} (--stop-after-zero-spread 0 lets such a run continue.)")
    return None


def _step_facts(run: TrainingRun, session: Session) -> dict[str, Any]:
    """Return what the rules read after a step, with mean seconds of a step and of its slowest reward."""
    rows, groups = session.rows[1:], run.args.estimator.needs_groups
    idle, step = steps_without_signal(run, session), session.step
    seconds = {name: total for name, total in run.totals.items() if name.startswith("rewards/")}
    slowest = max(seconds, key=seconds.__getitem__)
    return run_facts(
        run,
        session.rows,
        *("step", "first", "latest"),
        steps_without_signal=idle,
        patience=min(3, run.args.stop_after_zero_spread or 3),
        had_signal=any(share_equal(row, groups) < 1 for row in rows[: len(rows) - idle]),
        timed_steps=step,
        step_seconds=session.training_seconds / step,
        reward_seconds=seconds[slowest] / step,
        slowest_reward=slowest.removeprefix("rewards/").removesuffix("/seconds"),
    )


def judge_end(run: TrainingRun, session: Session, reason: str) -> list[Finding]:
    """Set the flags of a run that has ended, from its evaluations and last steps; return what is to be told.

    The difference of two evaluations is that of each prompt's mean reward, so that easy and hard prompts
    add no noise to it.
    """
    rows, groups = session.rows[1:], run.args.estimator.needs_groups
    numbers, solved = dict[str, Any](), getattr(run.task, "solved", None) or math.inf
    if session.is_evaluated and session.step:
        numbers["is_solved"] = rows[-1].get("eval_reward", 0) >= solved
        gain, error = over_prompts([now - then for then, now in zip(*run.means, strict=True)])
        error = 0.0 if math.isnan(error) else error
        if reason == "learnt" or gain > 2 * error:  # it has recovered
            session.flags = [flag for flag in session.flags if flag != "policy-destroyed"]
        else:
            before, after = (over_prompts(rewards).value for rewards in run.means)
            numbers |= {
                **{"gain": gain, "gain_stderr": error, "held_out": len(run.means[0])},
                **{"before_reward": before, "after_reward": after, "step_reward": after},
                "share_without_signal": fmean(share_equal(row, groups) == 1 for row in rows),
            }
    observed = run_facts(run, session.rows, "step", "recent", **numbers)
    findings = judge(observed, "nothing-learnt", "entropy-collapsed")
    findings = [finding for finding in findings if finding.weight != "watch"]
    if "policy-destroyed" in session.flags:
        names = {"nothing-learnt": "policy-destroyed"}
        findings = [replace(finding, flag=names.get(finding.flag, finding.flag)) for finding in findings]
    session.flags = list(dict.fromkeys([*session.flags, *(finding.flag for finding in findings)]))
    return findings


def run_facts(run: TrainingRun, rows: Rows, *parts: Part, **numbers: Any) -> dict[str, Any]:
    """Return the facts of rows of metrics (see `facts`), with what is known of the task and the model."""
    args, task, solved = run.args, run.task, getattr(run.task, "solved", None)
    uncut = "raise --max-completion-length, name strings that end them (--stop), or take another model."
    if asks_in_text(run):
        uncut = "the model has a chat template, so ask it in chat messages, with --chat."
    ours = is_own(task, args.model, run.learner.policy)
    numbers = {
        "usual_rate": run.usual_rate,
        "solved_at": solved,
        "pass_mark": run.rewards.pass_threshold if solved is None else solved,
        "can_warm_start": bool(getattr(task, "demonstrations", None)) and not (args.warm_start or ours),
        "uncut": uncut,
        **numbers,
    }
    return facts(rows, args, *parts, **numbers)


def steps_without_signal(run: TrainingRun, session: Session) -> int:
    """Return how many steps in a row, up to now, had no rewards that differ.

    A destroyed policy is right once in a while by luck; such a step, whose reward is below the middle of
    what was lost, does not end the row.
    """
    rows, middle, count = session.rows[1:], -math.inf, 0
    if "policy-destroyed" in session.flags:
        best = max(row["eval_reward"] for row in session.rows if finite(row.get("eval_reward")) is not None)
        middle = (best + min(row["reward"] for row in rows)) / 2
    for row in reversed(rows):
        if share_equal(row, run.args.estimator.needs_groups) == 1:
            count += 1
        elif row["reward"] >= middle:
            break
    return count


def _end_of_learning(run: TrainingRun, session: Session, steps: int) -> str:
    """Print why a run ends whose rewards are all equal and higher than before; return the exit reason."""
    solved, reward = getattr(run.task, "solved", None), session.rows[-1]["reward"]
    text = f"In {steps} steps in a row no two rewards that are compared differed"
    if solved is None or reward >= solved:
        session.console.note(f"{text}: the task is learnt.")
        return "learnt"
    session.console.warn(
        f"{text}: the policy is stuck. The mean reward is {reward:.3g}, and {solved:g} counts as solved. Try "
        "a lower --learning-rate, or a bonus for entropy (--estimator.entropy-coef)."
    )
    return "stuck"


def asks_in_text(run: TrainingRun) -> bool:
    """Whether the model has a chat template and its prompts are plain text, which it is not made for."""
    plain = isinstance(run.task.train_prompts[0]["prompt"], str) and not run.args.chat
    return bool(plain and run.learner.policy.tokenizer.chat_template)
