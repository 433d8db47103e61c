"""Checks a run before its first update (`--check`): tries it out, and prints every problem that it finds."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace

from tokenrl.control.rollouts import Rollout
from tokenrl.control.run import ControlResult, Run
from tokenrl.control.update import learn
from tokenrl.runs.console import duration
from tokenrl.runs.facts import settings_facts
from tokenrl.runs.findings import Finding
from tokenrl.runs.rules import judge
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
    rewards = rollout.returns if len(rollout.returns) else rollout.rewards[rollout.mask]
    what = "episodes" if len(rollout.returns) else "steps, in which no episode ended,"
    count = 1 + -(-args.max_steps // args.eval_every) if args.eval_every else 2
    whole = duration(args.max_steps * update + count * evaluation)
    work = f"{args.max_steps} updates and {count} evaluation{'s' * (count != 1)}"
    low, high = float(rewards.min()), float(rewards.max())
    measured = {
        "returns": f"{low:.4g} to {high:.4g} in {len(rewards)} {what.partition(',')[0]}",
        "observations": f"{largest:.3g} at most, in absolute value",
        "learning rate": f"{args.learning_rate:g}",
        "time": f"{update:.2g} s per update, about {whole} for {work}, if episodes stay as long as now",
    }
    alike = len(rewards) > 1 and low == high and rollout.lengths.unique().numel() <= 1
    facts = settings_facts(args) | {
        "lowest_rate": USUAL_RATES[0],
        "highest_rate": USUAL_RATES[1],
        "whose": "agents with Adam",
        "step_grad_norm": metrics["grad_norm"] if math.isfinite(metrics["grad_norm"]) else math.inf,
        "step_equal": float(alike or not rollout.rewards[rollout.mask].any()),
        "step_reward": low,
        "groups": f"{len(rewards)} {what}",
        "others_differ": session.eval_before["reward_stderr"] > 0,
    }
    findings = judge(facts)
    if not (SMALL <= largest <= LARGE or args.normalize_observations):
        text = (
            f"The largest absolute value of an observation was {largest:.3g}, and networks learn best from "
            "inputs near 1. Add --normalize-observations, or scale them in the environment."
        )
        findings.append(Finding("observations-far-from-1", "watch", text))
    code = session.conclude("environment, policy and estimator", measured, findings)
    result = run.result(session, "check")
    return replace(result, flags=session.flags, exit_code=result.exit_code or code)
