"""Reads the rules about numbers (`runs.rules`) at each step of a training, and at its end.

Says whether the updates have destroyed the policy, whether there is anything to learn from, and whether
anything was learnt.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Stopped
from tokenrl.language.training.defaults import is_own
from tokenrl.language.training.run import Run
from tokenrl.runs.facts import MOST, is_number, last_tenth, latest_facts, means, share_equal
from tokenrl.runs.findings import Finding
from tokenrl.runs.rules import SOLVED, judge
from tokenrl.runs.session import Session

LOST = ("policy-destroyed", "entropy-collapsed")
"""The flags of a policy that has been lost during a run."""


def judge_step(run: Run, session: Session) -> str | None:
    """Warn of a step that destroys the policy or can teach nothing; return why the run ends now, or None.

    Raises:
        Stopped: in many consecutive steps there was nothing to learn from, and the reward is no better than
            before training.
    """
    args, step, reward = run.args, session.step, run.rows[-1]["reward"]
    findings = {finding.flag: finding for finding in reversed(judge(_step_facts(run, session)))}
    lost = [flag for flag in LOST if flag in session.flags]
    if not lost and (new := [flag for flag in LOST if flag in findings]):
        lost = new[:1]
        session.flags += lost
        session.console.warn(f"step {step}: {findings[lost[0]].text}")
    better = reward > session.eval_before.get("reward", math.inf)
    none, idle = findings.get("no-signal"), steps_without_signal(run, session)
    if none and not (better or lost):
        session.warn_once("flat", f"step {step}: {none.text}")
    if none and args.stop_after_zero_spread and idle >= args.stop_after_zero_spread:
        if better:
            return _learnt(run, session, idle)
        why = next((findings[flag] for flag in lost if flag in findings), none).text
        session.flags = session.flags or ["nothing-learnt"]
        raise Stopped(f"{why} (--stop-after-zero-spread 0 lets such a run continue.)")
    for flag in ("all-truncated", "slow-reward"):
        if flag in findings:
            session.warn_once(flag, f"step {step}: {findings[flag].text}")
    return None


def judge_end(run: Run, session: Session, reason: str) -> list[Finding]:
    """Set the flags of a run that has ended, from its evaluations and last steps; return what is to be told.

    The difference of two evaluations is that of each prompt's mean reward, so that easy and hard prompts
    add no noise to it.
    """
    facts = means("recent", last_tenth(run.rows[1:]), needs_groups(run)) | settings_facts(run)
    del facts["recent_cut"]  # said of a step in which it is all of them
    if session.is_evaluated and session.step:
        change = run.means[-1] - run.means[0]
        gain, error = map(float, mean_and_error(change[~change.isnan()]))
        facts |= {
            "gain": gain,
            "gain_stderr": 0.0 if math.isnan(error) else error,
            "before_reward": float(run.means[0].nanmean()),
            "after_reward": float(run.means[-1].nanmean()),
            "held_out": len(change),
            "share_without_signal": fmean(_equal(run, row) == 1 for row in run.rows[1:]),
            "remedy": remedy(run, run.rows[-1]["completions/clipped_ratio"], float(run.means[-1].nanmean())),
        }
        if reason == "learnt" or gain > 2 * facts["gain_stderr"]:  # it has recovered
            session.flags = [flag for flag in session.flags if flag != "policy-destroyed"]
            del facts["gain"]
    findings = [f for f in judge(facts) if f.flag in ("nothing-learnt", "entropy-collapsed")]
    if "policy-destroyed" in session.flags:
        findings = [
            f._replace(flag="policy-destroyed") if f.flag == "nothing-learnt" else f for f in findings
        ]
    session.flags = list(dict.fromkeys([*session.flags, *(finding.flag for finding in findings)]))
    return findings


def _step_facts(run: Run, session: Session) -> dict[str, Any]:
    """Return the facts of the step just made, of the latest steps and of the time that rewards take."""
    args, row = run.args, run.rows[-1]
    idle = steps_without_signal(run, session)
    cut = row["completions/clipped_ratio"]
    return {
        **settings_facts(run),
        **latest_facts(run.rows, args.prompts_per_step, needs_groups(run)),
        **_time_facts(run),
        "before_reward": session.eval_before.get("reward"),
        "before_stderr": session.eval_before.get("reward_stderr"),
        "step_reward": row["reward"],
        "step_cut": cut,
        "steps_without_signal": idle,
        "patience": min(3, args.stop_after_zero_spread or 3),
        "had_signal": any(_equal(run, row) < 1 for row in run.rows[1 : len(run.rows) - idle]),
        "remedy": remedy(run, cut, row["reward"]),
    }


def _time_facts(run: Run) -> dict[str, Any]:
    """Return the seconds of a step, and of its slowest reward function, in the mean of the latest steps."""
    steps = [timings["step_seconds"] for timings in run.timings]
    names = {name for timings in run.timings for name in timings if name.startswith("rewards/")}
    seconds = {name: sum(timings.get(name, 0.0) for timings in run.timings) / len(steps) for name in names}
    if not seconds:
        return {}
    slowest = max(seconds, key=lambda name: seconds[name])
    return {
        "timed_steps": len(steps),
        "step_seconds": fmean(steps),
        "reward_seconds": seconds[slowest],
        "slowest_reward": slowest.removeprefix("rewards/").removesuffix("/seconds"),
    }


def settings_facts(run: Run) -> dict[str, Any]:
    """Return the settings that rules read."""
    args, usual = run.args, run.defaults.values.get("learning_rate")
    return {
        "learning_rate": args.learning_rate,
        "usual_rate": usual,
        "has_entropy_bonus": args.estimator.entropy_coef > 0,
        "entropy_bonus": 0.01,
        "solved_at": getattr(run.task, "solved", None),
        "pass_mark": pass_mark(run),
        "max_completion_length": args.max_completion_length,
        "uncut": uncut(run),
    }


def needs_groups(run: Run) -> bool:
    """Whether the estimator compares completions of the same prompt."""
    return bool(run.args.estimator.needs_groups)


def _equal(run: Run, row: dict[str, Any]) -> float:
    return share_equal(row, needs_groups(run))


def steps_without_signal(run: Run, session: Session) -> int:
    """Return how many steps in a row, up to now, had no rewards that differ.

    A destroyed policy is right once in a while by luck; such a step, whose reward is below the middle of
    what was lost, does not end the row.
    """
    rows, middle = run.rows[1:], -math.inf
    if "policy-destroyed" in session.flags:
        best = max(row["eval_reward"] for row in run.rows if is_number(row.get("eval_reward")))
        middle = (best + min(row["reward"] for row in rows)) / 2
    count = 0
    for row in reversed(rows):
        if _equal(run, row) == 1:
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


def pass_mark(run: Run) -> float | None:
    """Return the mean reward that counts as solved: the task's mark, else that of a right answer."""
    mark = getattr(run.task, "solved", None)
    return run.rewards.pass_threshold if mark is None else mark


def remedy(run: Run, cut: float, reward: float) -> str:
    """Say what helps a run without a signal most, from the share of completions cut and the mean reward."""
    args, policy, task, mark = run.args, run.learner.policy, run.task, pass_mark(run)
    if mark is not None and reward >= mark:
        return SOLVED
    demonstrations = getattr(task, "demonstrations", None)
    if demonstrations and not (args.warm_start or is_own(task, args.model, policy)):
        return "This model cannot do the task yet: add --warm-start, to begin with the task's demonstrations."
    if cut >= MOST:
        limit = args.max_completion_length
        return f"{cut:.0%} of the completions are cut at {limit} tokens, before an end: {uncut(run)}"
    return (
        "Use prompts that the policy sometimes solves, a graded reward, demonstrations first (--warm-start, "
        "or tokenrl sft), or more generations per prompt."
    )


def asks_in_text(run: Run) -> bool:
    """Whether the model has a chat template and its prompts are plain text, which it is not made for."""
    plain = isinstance(run.task.train_prompts[0]["prompt"], str) and not run.args.chat
    return bool(plain and run.learner.policy.tokenizer.chat_template)


def uncut(run: Run) -> str:
    """Say what lets completions end that are cut."""
    if asks_in_text(run):
        return "the model has a chat template, so ask it in chat messages, with --chat."
    return (
        "raise --max-completion-length, name strings that end them (--stop), or take a model that ends its "
        "answers."
    )
