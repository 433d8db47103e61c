"""Judges a run by the rules about numbers (`runs.rules`), at each step and at its end.

It is said whether the updates have destroyed the policy, whether there is anything to learn from, and whether
anything was learnt. The check before a run has `check.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from tokenrl.errors import Stopped
from tokenrl.language.evaluation.evaluation import over_prompts
from tokenrl.language.rollout.rewarded import failures_of
from tokenrl.language.supervised.defaults import is_own
from tokenrl.language.training.run import TrainingRun
from tokenrl.runs.findings import Finding, Part, evaluation_facts, facts, share_equal
from tokenrl.runs.metrics import of_evaluation
from tokenrl.runs.reader import finite
from tokenrl.runs.rules import judge
from tokenrl.runs.session import Session

Rows = Sequence[Mapping[str, Any]]

POLICY_LOST = ("policy-destroyed", "entropy-collapsed")
"""The flags of a policy that has been lost during a run."""


def judge_start(run: TrainingRun, session: Session) -> None:
    """Warn of samples that earn less than the greedy completions, from the evaluation before training."""
    for finding in judge(run_facts(run, session.rows), "greedy-gap"):
        session.warn_once(finding.flag, finding.text)


def judge_step(run: TrainingRun, session: Session) -> str | None:
    """Warn of a step that destroys the policy or can teach nothing; return why the run ends now, or None.

    Raises:
        Stopped: in many consecutive steps there was nothing to learn from, and the reward is no better than
            before training.
    """
    step = session.step
    reward = session.rows[-1].get("reward", math.nan)
    observed = _step_facts(run, session)
    idle = observed["steps_without_signal"]
    findings = {f.flag: f for f in reversed(judge(observed))}
    lost = [flag for flag in POLICY_LOST if flag in session.flags]
    if not lost:
        lost = [flag for flag in POLICY_LOST if flag in findings][:1]
        session.flags += lost
        for flag in lost:
            session.warn_once(flag, f"step {step}: {findings[flag].text}")
    for flag in ("truncation", "slow-reward"):
        if flag in findings:
            session.warn_once(flag, f"step {step}: {findings[flag].text}")
    for finding in judge(run_facts(run, session.rows, "recent"), "sampling-differs"):
        session.warn_once(finding.flag, f"step {step}: {finding.text}")
    if remark := getattr(run.learner.generator, "remark", ""):
        session.warn_once("sampling-differs", f"step {step}: {remark}.")
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
    rows = session.rows[1:]
    groups = run.args.estimator.needs_groups
    idle = steps_without_signal(run, session)
    step = session.step
    rewards = [name for name in run.totals if name.startswith("rewards/")]
    slowest = max(rewards, key=run.totals.__getitem__, default="")
    return run_facts(
        run,
        session.rows,
        *("step", "first", "latest"),
        steps_without_signal=idle,
        patience=min(3, run.args.stop_after_zero_spread or 3),
        had_signal=any(share_equal(row, groups) < 1 for row in rows[: len(rows) - idle]),
        timed_steps=step,
        step_seconds=session.training_seconds / step,
        reward_seconds=run.totals[slowest] / step,
        slowest_reward=slowest.removeprefix("rewards/").removesuffix("/seconds"),
    )


def judge_end(run: TrainingRun, session: Session) -> list[Finding]:
    """Set the flags of a run that has ended, from its evaluations and last steps; return what is to be told.

    The difference of two evaluations is that of each prompt's mean reward, so that easy and hard prompts
    add no noise to it.
    """
    rows = session.rows[1:]
    groups = run.args.estimator.needs_groups
    last = {"step": session.step, **of_evaluation(session.evaluation)}
    numbers = evaluation_facts([*session.rows, last])
    solved = getattr(run.task, "solved", None) or math.inf
    if session.evaluation and session.step:
        numbers["is_solved"] = rows[-1].get("eval_reward", 0) >= solved
        gains = [now - then for then, now in zip(*run.means, strict=True)]
        gain, error = over_prompts(gains)
        if math.isnan(error):
            error = 0.0
        if session.ended == "learnt" or gain > 2 * error:  # it has recovered
            session.flags = [flag for flag in session.flags if flag != "policy-destroyed"]
        elif not run.unrewarded:
            after = _shown_reward(session.evaluation)
            numbers |= {
                "gain": gain,
                "gain_stderr": error,
                "held_out": sum(not math.isnan(x) for x in gains),
                "before_reward": _shown_reward(session.eval_before),
                "after_reward": after,
                "step_reward": after,
                "share_without_signal": fmean(share_equal(row, groups) == 1 for row in rows),
            }
    observed = run_facts(run, session.rows, "step", "recent", **numbers)
    findings = []
    for finding in judge(observed, "nothing-learnt", "entropy-collapsed", "greedy-fell"):
        if finding.weight == "watch":
            continue
        if finding.flag == "nothing-learnt" and "policy-destroyed" in session.flags:
            finding = replace(finding, flag="policy-destroyed")
        findings.append(finding)
    if session.evaluation and (failed := failures_of(run.failures)):
        findings.append(Finding("environment-fails", "act", f"in the last evaluation {failed}"))
    session.flags = list(dict.fromkeys([*session.flags, *(finding.flag for finding in findings)]))
    return findings


def _shown_reward(evaluation: Mapping[str, float]) -> float:
    """Return the reward of an evaluation that people see: of sampled completions, or else of greedy ones."""
    return evaluation.get("reward", evaluation["reward_greedy"])


def run_facts(run: TrainingRun, rows: Rows, *parts: Part, **numbers: Any) -> dict[str, Any]:
    """Return the facts of rows of metrics (see `facts`), with what is known of the task and the model."""
    args = run.args
    task = run.task
    solved = getattr(task, "solved", None)
    uncut = (
        "raise --max-completion-length, name strings that end them (--stop), or take another model."
    )
    if asks_in_text(run):
        uncut = "the model has a chat template, so ask it in chat messages, with --chat."
    is_ready = args.warm_start or is_own(task, args.model, run.learner.policy)
    of_run = {
        "usual_rate": run.settings.usual_rate,
        "solved_at": solved,
        "pass_mark": run.rewards.pass_threshold if solved is None else solved,
        "can_warm_start": bool(getattr(task, "demonstrations", None)) and not is_ready,
        "uncut": uncut,
        "short_texts": _advice_on_positions(run.learner.policy.model.config),
    }
    return facts(rows, args, *parts, **of_run | numbers)


def _advice_on_positions(config: Any) -> str:
    """Return what a longrope model needs, whose positions change in long texts; empty for other models."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):  # one for all layers, or one for each type of layer
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            limit = rope["original_max_position_embeddings"]
            return (
                f"In a text of more than {limit:,} tokens this model changes the positions of all (longrope), "
                "also of those sampled before: keep the prompt with --max-completion-length below that"
            )
    return ""


def steps_without_signal(run: TrainingRun, session: Session) -> int:
    """Return how many steps in a row, up to now, had no rewards that differ; 0 if a teacher teaches.

    A destroyed policy is right once in a while by luck; such a step, whose reward is below the middle of
    what was lost, does not end the row.
    """
    if run.args.teacher is not None:
        return 0
    rows = session.rows[1:]
    middle = -math.inf
    if "policy-destroyed" in session.flags:
        evaluated = [finite(row.get("eval_reward")) for row in session.rows]
        best = max(reward for reward in evaluated if reward is not None)
        middle = (best + min(row["reward"] for row in rows)) / 2
    count = 0
    for row in reversed(rows):
        if share_equal(row, run.args.estimator.needs_groups) == 1:
            count += 1
        elif row["reward"] >= middle:
            break
    return count


def _end_of_learning(run: TrainingRun, session: Session, steps: int) -> str:
    """Print why a run ends whose rewards are all equal and higher than before; return the exit reason."""
    solved = getattr(run.task, "solved", None)
    reward = session.rows[-1]["reward"]
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
