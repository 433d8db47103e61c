"""Checks a run before its first update (`--check`): tries it out, and tells all problems at once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace

from tokenrl.control.rollouts import Rollout
from tokenrl.control.run import ControlResult, Run
from tokenrl.control.update import learn
from tokenrl.runs.checkup import Finding, checked, conclude, rate_finding, time_needed
from tokenrl.runs.session import Session

USUAL_RATES = 1e-3, 2e-2
"""Adam's usual learning rates for agents, from deep networks to small ones (see `agents` and the default)."""
SMALL, LARGE = 0.1, 10
"""A network learns well if the largest absolute value of the observations lies between these."""


def check_agent(
    run: Run, session: Session, evaluate: Callable[[], dict[str, float]], collect: Callable[[], Rollout]
) -> ControlResult:
    """Check a run whose parts are ready, print what was found, and return the result.

    Args:
        run: the run. Its policy and its critic stay as they are, bit for bit.
        session: the session, which has been opened.
        evaluate: evaluates the policy, as before the first update.
        collect: collects the rollout of a first update.

    Returns:
        The result, with exit code 2 if there is a problem, else 0; its `flags` name problems and remarks.

    Raises:
        Stopped: the environment failed.
    """
    args, began = run.args, time.perf_counter()
    session.evaluated(evaluate())
    evaluated = time.perf_counter()
    rollout = collect()
    metrics = learn(copy.deepcopy(run.agent), rollout, 1)
    evaluation, update = evaluated - began, time.perf_counter() - evaluated
    largest = float(rollout.observations[rollout.mask].abs().max())
    rewards, returns = rollout.rewards[rollout.mask], rollout.returns
    if len(returns):
        episodes = _counted(len(returns), "episode")
        reached = f"{float(returns.min()):.4g} to {float(returns.max()):.4g} in {episodes}"
    else:
        reached = f"no episode ended; rewards from {float(rewards.min()):.4g} to {float(rewards.max()):.4g}"
    measured = {
        "returns": reached,
        "observations": f"{largest:.3g} at most, in absolute value",
        "learning rate": f"{args.learning_rate:g}",
        "time": _time_cost(run, evaluation, update),
    }
    low, high = USUAL_RATES
    nearest = min(max(args.learning_rate, low), high)
    found = [
        _signal_finding(rollout, alike=session.eval_before["reward_stderr"] == 0),
        None if math.isfinite(metrics["grad_norm"]) else _not_finite(),
        _scale_finding(run, largest),
        rate_finding(args.learning_rate, nearest, "agents with Adam"),
    ]
    findings = [finding for finding in found if finding is not None]
    code = conclude(session, "environment, policy and estimator", measured, findings)
    return checked(replace(run.result(session, "check"), flags=session.flags), code)


def _signal_finding(rollout: Rollout, *, alike: bool) -> Finding | None:
    """Return a finding if no two episodes differ in what they were rewarded, or no step was rewarded.

    Args:
        rollout: what a first update would learn from.
        alike: whether the episodes of the evaluation have equal returns too. If not, the rollout shows no
            signal yet, as where it ends before the episodes do, and later ones may.
    """
    rewards, returns, lengths = rollout.rewards[rollout.mask], rollout.returns, rollout.lengths
    number = _counted(len(returns), "episode") if len(returns) else f"{rollout.env_steps} steps"
    if not rewards.any():
        found = f"Every reward in {number} was 0."
    elif len(returns) > 1 and returns.unique().numel() == lengths.unique().numel() == 1:
        found = f"All {number} had the same return, {float(returns[0]):.4g}, and the same length."
    elif not len(returns) and rewards.unique().numel() == 1:
        found = f"No episode ended in {number}, and every reward was {float(rewards[0]):.4g}."
    else:
        return None
    why = "There is nothing to learn from."
    mend = "Reward steps towards the goal, let more episodes be tried (--num-envs), or make episodes longer "
    mend += "(--max-episode-steps, --num-steps), so that some of them reach something."
    if not alike:
        why = "This rollout teaches nothing; episodes of the evaluation do differ, so later ones may."
    return Finding("nothing-to-learn", found, why, mend, grave=alike)


def _not_finite() -> Finding:
    found, why = "The gradient is not finite.", "Such updates are skipped, and the run stops after some."
    return Finding("gradient-not-finite", found, why, "Scale the rewards down with --reward-scale.")


def _scale_finding(run: Run, largest: float) -> Finding | None:
    if SMALL <= largest <= LARGE or run.args.normalize_observations:
        return None
    found = f"The largest absolute value of an observation was {largest:.3g}."
    why = "Networks learn best from inputs near 1."
    mend = "Add --normalize-observations, or scale them in the environment."
    return Finding("observations-far-from-1", found, why, mend, grave=False)


def _time_cost(run: Run, evaluation: float, update: float) -> str:
    """Estimate the time of the run in words; episodes that become longer take longer."""
    args = run.args
    count = 1 + -(-args.max_steps // args.eval_every) if args.eval_every else 2
    low, high = (args.max_steps * update * share + count * evaluation for share in (0.7, 1.3))
    work = f"{args.max_steps} updates and {_counted(count, 'evaluation')}"
    return f"{time_needed(low, high)} for {work}, if episodes stay as long as now"


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"
