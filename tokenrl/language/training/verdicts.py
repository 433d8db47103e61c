"""Says whether a run has anything to learn from, has destroyed its policy, or has learnt nothing."""

from __future__ import annotations

import math

from tokenrl.core.rows import teaches_nothing
from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Stopped
from tokenrl.language.training.defaults import is_own
from tokenrl.language.training.run import Run
from tokenrl.runs.session import Session

FLAT_STEPS = 3
"""After this many steps in a row without a signal a run says so."""
CUT = 0.5
"""From this share of completions on that are cut, their length is what to mend first."""
FELL = 3
"""Standard errors of the evaluation before training by which a reward without a signal counts as fallen."""

SOLVED = "The policy already solves these prompts: take harder ones, or evaluate it (tokenrl evaluate)."


def nothing_left(run: Run, session: Session, metrics: dict[str, float]) -> str | None:
    """Warn of a step that destroys the policy or can teach nothing; return why the run ends now, or None.

    Raises:
        Stopped: in many consecutive steps there was nothing to learn from, and the reward is no better than
            before training.
    """
    args = run.args
    assert run.watch is not None
    if found := run.watch.see(session.step, metrics):
        session.flags.append(found.flag)
        session.console.warn(f"step {session.step}: {_lost(run)}")
    flat = teaches_nothing(args.estimator, metrics)
    # A lost policy is right once in a while by luck, and its steps without a signal still add up.
    run.flat_steps = run.flat_steps + flat if flat or _still_lost(run, metrics["reward"]) else 0
    run.all_flat += flat
    better = metrics["reward"] > session.eval_before.get("reward", math.inf)
    if run.flat_steps >= FLAT_STEPS and not (better or run.watch.found):
        session.warn_once("flat", f"step {session.step}: {_flat(run, session, metrics)}")
    if args.stop_after_zero_spread and run.flat_steps >= args.stop_after_zero_spread:
        if better:
            return _learnt(run, session, metrics["reward"])
        why = _lost(run) if run.watch.found else _flat(run, session, metrics)
        session.flags = session.flags or ["nothing-learnt"]
        raise Stopped(f"{why} (--stop-after-zero-spread 0 lets such a run continue.)")
    if metrics["completions/clipped_ratio"] == 1:
        session.warn_once(
            "cut",
            f"step {session.step}: every completion was cut at {args.max_completion_length} tokens, before "
            "an end. Raise max_completion_length, start from a model that ends its answers, or name strings "
            "that end them (stop).",
        )
    return None


def _learnt(run: Run, session: Session, reward: float) -> str:
    """Say why a run ends whose rewards are all equal and higher than before; return it in a word."""
    solved = getattr(run.task, "solved", None)
    if solved is None or reward >= solved:
        session.console.note(f"{_in_a_row(run)}: the task is learnt.")
        return "learnt"
    session.console.warn(
        f"{_in_a_row(run)}: the policy is stuck. The mean reward is {reward:.3g}, and {solved:g} counts as "
        f"solved. {_slower(run)} A bonus for entropy (--estimator.entropy-coef) helps too."
    )
    return "stuck"


def judge(run: Run, session: Session, reason: str) -> list[str]:
    """Set the flags of a run that has ended, from its evaluations before and after; return them in words.

    The difference of two evaluations is that of each prompt's mean reward, so that easy and hard prompts
    add no noise to it. It is a gain if it exceeds two standard errors.
    """
    if not session.is_evaluated or session.step == 0:
        return []
    change = run.means[-1] - run.means[0]
    difference, error = mean_and_error(change[~change.isnan()])
    if reason == "learnt" or difference > 2 * error.nan_to_num(0.0):
        session.flags = [flag for flag in session.flags if flag != "policy-destroyed"]  # it has recovered
        return []
    before, after = (float(means.nanmean()) for means in run.means)
    found = (
        f"the held-out reward was {before:.3g} before training and {after:.3g} after it, a difference of "
        f"{float(difference):.2g} +- {float(error):.1g} over {len(change)} prompts"
    )
    if "policy-destroyed" in session.flags:
        return [f"policy-destroyed: {found}. {_lost(run)}"]
    session.flags.append("nothing-learnt")
    if run.watch is not None and run.watch.found:
        why = _lost(run)
    elif difference < -2 * error:
        why = f"It has fallen. {_slower(run)}"
    elif solves(run, before):
        why = f"It is no gain beyond noise, and little was left to gain. {SOLVED}"
    elif 2 * run.all_flat >= session.step:
        idle = f"In {run.all_flat} of {session.step} steps no two completions of {_compared(run)} differed"
        why = f"It is no gain beyond noise. {idle} in reward. {remedy(run, run.cut, after)}"
    else:
        why = "It is no gain beyond noise. More steps, more completions a step or a higher rate may give one."
    return [f"nothing-learnt: {found}. {why}"]


def _still_lost(run: Run, reward: float) -> bool:
    """Whether the policy was destroyed and has not won back half of its reward in this step."""
    found = run.watch.found if run.watch else None
    return bool(found and found.flag == "policy-destroyed" and 2 * reward < found.before + found.after)


def _lost(run: Run) -> str:
    assert run.watch is not None
    return f"{run.watch.found} {_slower(run)}"


def _slower(run: Run) -> str:
    """Say that the learning rate is the likely cause of a loss, and which one to take."""
    args, task = run.args, run.task
    rate = args.learning_rate
    advised = run.defaults.values.get("learning_rate")
    cause = f"The learning rate, {rate:g}, is the likely cause"
    if advised is None:
        return f"{cause}: try --learning-rate {rate / 4:g}."
    if rate > advised:
        own = (getattr(task, "train", None) or {}).get("learning_rate") == advised
        whose = "the task recommends" if own else "for this model the default is"
        return f"{cause}: {whose} {advised:g} (--learning-rate {advised:g})."
    return f"{cause}, though it is not above the usual {advised:g}: try --learning-rate {rate / 4:g}."


def _compared(run: Run) -> str:
    return "the same prompt" if run.args.estimator.needs_groups else "the step"


def _in_a_row(run: Run) -> str:
    return f"In {run.flat_steps} steps in a row no two completions of {_compared(run)} differ in reward"


def _flat(run: Run, session: Session, metrics: dict[str, float]) -> str:
    """Say that there is no signal, what was seen, and what to change."""
    text = f"{_in_a_row(run)}, so there is nothing to learn from: the mean reward is {metrics['reward']:.3g}"
    before, error = (session.eval_before.get(name, math.nan) for name in ("reward", "reward_stderr"))
    if run.all_flat < session.step and metrics["reward"] < before - FELL * error:
        return f"{text}, down from {before:.3g} before training. {_slower(run)}"
    return f"{text}. {remedy(run, metrics['completions/clipped_ratio'], metrics['reward'])}"


def solves(run: Run, reward: float) -> bool:
    """Whether a mean reward counts as solved: by the task's mark, else by that of a right answer."""
    mark = getattr(run.task, "solved", None)
    mark = run.rewards.pass_threshold if mark is None else mark
    return mark is not None and reward >= mark


def remedy(run: Run, cut: float, reward: float) -> str:
    """Say what helps a run without a signal most, from the share of completions cut and the mean reward."""
    if solves(run, reward):
        return SOLVED
    args, policy, task = run.args, run.learner.policy, run.task
    shown = getattr(task, "demonstrations", None)
    if shown and not (args.warm_start or is_own(task, args.model, policy)):
        return "This model cannot do the task yet: add --warm-start, to begin with the task's demonstrations."
    if cut >= CUT:
        limit = args.max_completion_length
        return f"{cut:.0%} of the completions are cut at {limit} tokens, before an end: {uncut(run)}"
    return (
        "Use prompts that the policy sometimes solves, a graded reward, demonstrations first (--warm-start, "
        "or tokenrl sft), or more generations per prompt."
    )


def to_chat(run: Run) -> bool:
    """Whether the model has a chat template and its prompts are plain text, which it is not made for."""
    plain = isinstance(run.task.train_prompts[0]["prompt"], str) and not run.args.chat
    return bool(plain and run.learner.policy.tokenizer.chat_template)


def uncut(run: Run) -> str:
    """Say what lets completions end that are cut."""
    if to_chat(run):
        return "the model has a chat template, so ask it in chat messages, with --chat."
    return (
        "raise --max-completion-length, name strings that end them (--stop), or take a model that ends its "
        "answers."
    )
