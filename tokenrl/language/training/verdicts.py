"""Judges a run by the rules about numbers (`runs.rules`), before it, at each step and at its end.

It warns when updates destroyed the policy, when rewards no longer differ, and when nothing was learnt.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import takewhile
from statistics import fmean
from typing import Any

from tokenrl.errors import Stopped, ending
from tokenrl.language.evaluation.estimates import over_prompts
from tokenrl.language.rollout.rewarded import failures_of
from tokenrl.language.supervised.defaults import is_own
from tokenrl.language.training.run import TrainingRun
from tokenrl.runs.findings import Gain, Observed, observe, share_equal
from tokenrl.runs.metric_table import Rows, exceeds, finite, is_rounding, reaches
from tokenrl.runs.processes import gather_objects
from tokenrl.runs.rules import Finding, judge
from tokenrl.runs.session import Session
from tokenrl.user_code import user_code

TOLD = (
    "policy-destroyed",
    "truncation",
    "sampling-differs",
    "sampled-elsewhere",
    "rewards-abstain",
)
"""Findings of a step that are told when they come up."""
LEAST_SHARE = 0.1
"""Effective sample size, as a share of the completions, below which logged rows are too far from the policy."""
OF_END = (
    "nothing-learnt",
    "constant-answer",
    "learnt-by-heart",
    "critic-useless",
    "few-prompts",
    "entropy-collapsed",
    "greedy-fell",
)
"""Findings about a run that has ended."""


def judge_start(run: TrainingRun, session: Session) -> None:
    """Warn of samples that earn less than the greedy completions, from the evaluation before training."""
    for finding in judge(observe_run(run, session.rows), "greedy-gap"):
        session.warn_once(finding.flag, finding.text)


def judge_step(run: TrainingRun, session: Session) -> None:
    """Warn of a step that destroys the policy or can teach nothing, and end a run that is solved or cannot learn.

    Raises:
        Stopped: in many consecutive steps there was nothing to learn from, and the reward is no better than
            before training.
    """
    start = f"step {session.step}:"
    limit = run.args.stop_after_zero_spread
    idle = steps_without_signal(run, session)
    observed = replace(observe_run(run, session.rows), idle_steps=idle)
    texts = {finding.flag: finding.text for finding in judge(observed)}
    for flag in TOLD:
        if flag in texts:
            session.warn_once(flag, f"{start} {texts[flag]}")
    share = observed.recent.effective_samples
    if observed.rows is not None and share < LEAST_SHARE:
        session.warn_once(
            "log-far",
            f"{start} the log is too far from the policy. The effective sample size is {share:.1%} of the completions, "
            "so a few decide each update. Take rows of a nearer policy, a lower --rows-share or smaller steps, or "
            "bound the weights (--estimator.importance-cap 2), which is biased.",
        )
    if remark := run.learner.generator.remark:
        session.warn_once("sampling-differs", f"{start} {remark}")
    if "policy-destroyed" in texts and "policy-destroyed" not in session.flags:
        session.flags.append("policy-destroyed")
    if run.search.until_solved is not None:
        session.end("solved", f"after {run.search.until_solved:,} completions")
        return
    if "no-signal" not in texts:
        return
    ends = 0 < limit <= idle
    # The first step samples from the policy before training too, also where evaluations sample nothing.
    before = session.eval_before.get("reward", session.rows[1].get("reward", math.inf))
    if exceeds(observed.step.reward, before) and observed.rows is None:
        if ends:
            _end_learning(run, session, observed)
        return
    if "policy-destroyed" not in session.flags:
        session.warn_once("flat", f"{start} {texts['no-signal']}")
    if ends:
        session.flags = session.flags or ["nothing-learnt"]
        text = texts.get("policy-destroyed", texts["no-signal"])
        raise Stopped(f"{text} (--stop-after-zero-spread 0 lets such a run continue.)")


def end_by_user(
    callback: Any, metrics: dict[str, float], session: Session, words: list[str]
) -> None:
    """Call the user's function after a step, and end the run if code of the user's asks for it, in any process.

    The `words` are those with which such code has ended the run in this step; else there are none.
    """
    wish = False
    with ending(words), user_code():
        wish = callback is not None and callback(session.step, dict(metrics)) is True
    if everywhere := gather_objects(words):
        session.end("finished", everywhere[0])
    elif any(gather_objects([wish])):
        session.end("callback")


def judge_end(run: TrainingRun, session: Session) -> list[Finding]:
    """Set the flags of a run that has ended, from its evaluations and last steps; return what is to be told.

    The difference of two evaluations is that of each prompt's mean reward, so that easy and hard prompts
    add no noise to it.
    """
    observed = observe_run(run, session.rows)
    # The others were set where a run failed that goes on now.
    flags = [flag for flag in session.flags if flag == "policy-destroyed"]
    if session.evaluation and session.step:
        gain = _gain(run, session)
        if session.ended == "learnt" or gain.value > 2 * gain.error:  # it has recovered
            flags = []
        elif not run.unrewarded and session.ended != "solved":
            observed = replace(observed, gain=gain)
    findings = []
    for finding in judge(observed, *OF_END):
        if flags and finding.flag == "nothing-learnt":
            finding = replace(finding, flag="policy-destroyed")
        if finding.weight != "watch":
            findings.append(finding)
    if session.evaluation and (failed := failures_of(run.failures)):
        findings.append(Finding("environment-fails", "act", f"in the last evaluation {failed}"))
    session.flags = list(dict.fromkeys([*flags, *(finding.flag for finding in findings)]))
    return findings


def _gain(run: TrainingRun, session: Session) -> Gain:
    """Return how much the rewards of the held-out prompts have gained; an unknown error counts as 0."""
    groups = run.args.estimator.needs_groups
    pairs = [*zip(*run.means, strict=True)]
    gains = [0.0 if is_rounding(abs(now - then), then) else now - then for then, now in pairs]
    value, error = over_prompts(gains)
    start = session.eval_before
    return Gain(
        value,
        0.0 if math.isnan(error) else error,
        before=start.get("reward", start.get("reward_greedy", math.nan)),
        equal=fmean(share_equal(row, groups) == 1 for row in session.rows[1:]),
    )


def observe_run(run: TrainingRun, rows: Rows) -> Observed:
    """Return what rows of metrics say (see `observe`), with what is known of the task and the model."""
    task = run.task
    solved = task.solved
    observed = observe(rows, run.args)
    if asks_in_text(run):
        words = "the model has a chat template, so ask it in chat messages, with --chat."
        observed = replace(observed, uncut=words)
    is_ready = run.args.warm_start or is_own(task, run.args.model, run.learner.policy)
    step = rows[-1] if rows else {}
    reward = finite(step.get("eval_reward", step.get("eval_reward_greedy")))
    faults = run.rewards.faults.values()
    return replace(
        observed,
        is_solved=solved is not None and reaches(reward, solved),
        constant=run.constant,
        lowest_rate=run.plan.usual_rate,
        highest_rate=run.plan.usual_rate,
        abstention=observed.abstention and " ".join([observed.abstention, *faults]),
        pass_mark=finite(run.rewards.pass_threshold if solved is None else solved),
        can_warm_start=bool(task.demonstrations) and not is_ready,
    )


def steps_without_signal(run: TrainingRun, session: Session) -> int:
    """Return how many steps in a row, up to now, had no rewards that differ; 0 if a teacher teaches."""
    groups = run.args.estimator.needs_groups
    rows = [] if run.args.teacher is not None else session.rows[:0:-1]
    return len(list(takewhile(lambda row: share_equal(row, groups) == 1, rows)))


def _end_learning(run: TrainingRun, session: Session, observed: Observed) -> None:
    """End a run whose rewards are all equal and higher than before, and print why."""
    solved = run.task.solved
    reward = observed.step.reward
    text = f"In {observed.idle_steps} steps in a row no two rewards that are compared differed"
    if solved is None or reaches(reward, solved):
        session.console.note(f"{text}: the task is learnt.")
        session.end("learnt")
    else:
        session.console.warn(
            f"{text}: the policy is stuck. The mean reward is {reward:.3g}, and {solved:g} counts as solved. Try "
            "a lower --learning-rate, or a bonus for entropy (--estimator.entropy-coef)."
        )
        session.end("stuck")


def asks_in_text(run: TrainingRun) -> bool:
    """Whether the model has a chat template and its prompts are plain text, which it is not made for."""
    plain = isinstance(run.task.train_prompts[0]["prompt"], str) and not run.args.chat
    return bool(plain and run.learner.policy.tokenizer.chat_template)
