"""Reads the rules about numbers (`runs.rules`) at each step of a training, and at its end.

Says whether the updates have destroyed the policy, whether there is anything to learn from, and whether
anything was learnt.
"""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean
from typing import Any

from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Stopped
from tokenrl.language.training.defaults import is_own
from tokenrl.language.training.run import Run
from tokenrl.runs.facts import is_number, last_tenth, latest_facts, means, settings_facts, share_equal
from tokenrl.runs.findings import Finding
from tokenrl.runs.rules import judge
from tokenrl.runs.session import Session

LOST = ("policy-destroyed", "entropy-collapsed")
"""The flags of a policy that has been lost during a run."""


def judge_step(run: Run, session: Session) -> str | None:
    """Warn of a step that destroys the policy or can teach nothing; return why the run ends now, or None.

    Raises:
        Stopped: in many consecutive steps there was nothing to learn from, and the reward is no better than
            before training.
    """
    step, reward, before = session.step, run.rows[-1]["reward"], session.eval_before.get("reward", math.inf)
    facts = _step_facts(run, session)
    idle, findings = facts["steps_without_signal"], {one.flag: one for one in reversed(judge(facts))}
    lost = [flag for flag in LOST if flag in session.flags]
    if not lost and (new := [flag for flag in LOST if flag in findings]):
        lost = new[:1]
        session.flags += lost
        session.console.warn(f"step {step}: {findings[lost[0]].text}")
    for flag in ("all-truncated", "slow-reward"):
        if flag in findings:
            session.warn_once(flag, f"step {step}: {findings[flag].text}")
    if (none := findings.get("no-signal")) is None:
        return None
    ends = 0 < run.args.stop_after_zero_spread <= idle
    if reward > before:
        return _learnt(run, session, idle) if ends else None
    if not lost:
        session.warn_once("flat", f"step {step}: {none.text}")
    if ends:
        why = next((findings[flag] for flag in lost if flag in findings), none)
        session.flags = session.flags or ["nothing-learnt"]
        raise Stopped(f"{why.text} (--stop-after-zero-spread 0 lets such a run continue.)")
    return None


def _step_facts(run: Run, session: Session) -> dict[str, Any]:
    """Return what the rules read after a step, with mean seconds of a step and of its slowest reward."""
    rows, groups, seconds = run.rows[1:], run.args.estimator.needs_groups, run.seconds
    idle = steps_without_signal(run, session)
    rewards = [name for name in seconds if name.startswith("rewards/")]
    slowest = max(rewards, key=seconds.__getitem__, default="")
    return {
        **known_facts(run),
        **latest_facts(run.rows, run.args.prompts_per_step, groups),
        "before_reward": session.eval_before.get("reward"),
        "before_stderr": session.eval_before.get("reward_stderr"),
        "step_reward": rows[-1]["reward"],
        "step_cut": rows[-1]["completions/clipped_ratio"],
        "steps_without_signal": idle,
        "patience": min(3, run.args.stop_after_zero_spread or 3),
        "had_signal": any(share_equal(row, groups) < 1 for row in rows[: len(rows) - idle]),
        "timed_steps": session.step,
        "step_seconds": seconds["step_seconds"] / session.step,
        "reward_seconds": seconds[slowest] / session.step,
        "slowest_reward": slowest.removeprefix("rewards/").removesuffix("/seconds"),
    }


def judge_end(run: Run, session: Session, reason: str) -> list[Finding]:
    """Set the flags of a run that has ended, from its evaluations and last steps; return what is to be told.

    The difference of two evaluations is that of each prompt's mean reward, so that easy and hard prompts
    add no noise to it.
    """
    rows, groups = run.rows[1:], run.args.estimator.needs_groups
    facts = known_facts(run) | means("recent", last_tenth(rows), groups)
    if session.is_evaluated and session.step:
        change = run.means[-1] - run.means[0]
        gain, error = map(float, mean_and_error(change[~change.isnan()]))
        error = 0.0 if math.isnan(error) else error
        if reason == "learnt" or gain > 2 * error:  # it has recovered
            session.flags = [flag for flag in session.flags if flag != "policy-destroyed"]
        else:
            before, after = (float(rewards.nanmean()) for rewards in (run.means[0], run.means[-1]))
            facts |= {
                **{"gain": gain, "gain_stderr": error, "held_out": len(change)},
                **{"before_reward": before, "after_reward": after, "step_reward": after},
                "share_without_signal": fmean(share_equal(row, groups) == 1 for row in rows),
                "step_cut": rows[-1]["completions/clipped_ratio"],
            }
    findings = [one for one in judge(facts) if one.flag in ("nothing-learnt", "entropy-collapsed")]
    if "policy-destroyed" in session.flags:
        names = {"nothing-learnt": "policy-destroyed"}
        findings = [replace(one, flag=names.get(one.flag, one.flag)) for one in findings]
    session.flags = list(dict.fromkeys([*session.flags, *(finding.flag for finding in findings)]))
    return findings


def known_facts(run: Run) -> dict[str, Any]:
    """Return the settings, and what is known of the task and the model, as facts."""
    args, task, solved = run.args, run.task, getattr(run.task, "solved", None)
    uncut = "raise --max-completion-length, name strings that end them (--stop), or take another model."
    if asks_in_text(run):
        uncut = "the model has a chat template, so ask it in chat messages, with --chat."
    own = is_own(task, args.model, run.learner.policy)
    return settings_facts(args) | {
        "usual_rate": run.defaults.values.get("learning_rate"),
        "solved_at": solved,
        "pass_mark": run.rewards.pass_threshold if solved is None else solved,
        "can_warm_start": bool(getattr(task, "demonstrations", None)) and not (args.warm_start or own),
        "uncut": uncut,
    }


def steps_without_signal(run: Run, session: Session) -> int:
    """Return how many steps in a row, up to now, had no rewards that differ.

    A destroyed policy is right once in a while by luck; such a step, whose reward is below the middle of
    what was lost, does not end the row.
    """
    rows, middle, count = run.rows[1:], -math.inf, 0
    if "policy-destroyed" in session.flags:
        best = max(row["eval_reward"] for row in run.rows if is_number(row.get("eval_reward")))
        middle = (best + min(row["reward"] for row in rows)) / 2
    for row in reversed(rows):
        if share_equal(row, run.args.estimator.needs_groups) == 1:
            count += 1
        elif row["reward"] >= middle:
            break
    return count


def _learnt(run: Run, session: Session, steps: int) -> str:
    """Say why a run ends whose rewards are all equal and higher than before; return it in a word."""
    solved, reward = getattr(run.task, "solved", None), run.rows[-1]["reward"]
    text = f"In {steps} steps in a row no two rewards that are compared differed"
    if solved is None or reward >= solved:
        session.console.note(f"{text}: the task is learnt.")
        return "learnt"
    session.console.warn(
        f"{text}: the policy is stuck. The mean reward is {reward:.3g}, and {solved:g} counts as solved. Try "
        "a lower --learning-rate, or a bonus for entropy (--estimator.entropy-coef)."
    )
    return "stuck"


def asks_in_text(run: Run) -> bool:
    """Whether the model has a chat template and its prompts are plain text, which it is not made for."""
    plain = isinstance(run.task.train_prompts[0]["prompt"], str) and not run.args.chat
    return bool(plain and run.learner.policy.tokenizer.chat_template)
