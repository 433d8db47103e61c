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
from tokenrl.runs.console import duration
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
    rewards, returns = rollout.rewards[rollout.mask], rollout.returns
    if len(returns):
        episodes = _counted(len(returns), "episode")
        reached = f"{float(returns.min()):.4g} to {float(returns.max()):.4g} in {episodes}"
    else:
        reached = f"no episode ended; rewards from {float(rewards.min()):.4g} to {float(rewards.max()):.4g}"
    count = 1 + -(-args.max_steps // args.eval_every) if args.eval_every else 2
    whole = duration(args.max_steps * update + count * evaluation)
    work = f"{args.max_steps} updates and {_counted(count, 'evaluation')}"
    measured = {
        "returns": reached,
        "observations": f"{largest:.3g} at most, in absolute value",
        "learning rate": f"{args.learning_rate:g}",
        "time": f"{update:.2g} s per update, about {whole} for {work}, if episodes stay as long as now",
    }
    findings = _signal(rollout, alike=session.eval_before["reward_stderr"] == 0)
    findings += judge(
        {
            "learning_rate": args.learning_rate,
            "lowest_rate": USUAL_RATES[0],
            "highest_rate": USUAL_RATES[1],
            "whose": "agents with Adam",
            "step_grad_norm": metrics["grad_norm"] if math.isfinite(metrics["grad_norm"]) else math.inf,
        }
    )
    if not (SMALL <= largest <= LARGE or args.normalize_observations):
        text = (
            f"The largest absolute value of an observation was {largest:.3g}, and networks learn best from "
        )
        text += "inputs near 1. Add --normalize-observations, or scale them in the environment."
        findings.append(Finding("observations-far-from-1", "watch", text))
    code = session.conclude("environment, policy and estimator", measured, findings)
    result = run.result(session, "check")
    return replace(result, flags=session.flags, exit_code=result.exit_code or code)


def _signal(rollout: Rollout, *, alike: bool) -> list[Finding]:
    """Return a finding if no two episodes differ in what they were rewarded, or no step was rewarded.

    Args:
        rollout: what a first update would learn from.
        alike: whether the episodes of the evaluation have equal returns too. If not, the rollout shows no
            signal yet, as where it ends before the episodes do, and later ones may.
    """
    rewards, returns, lengths = rollout.rewards[rollout.mask], rollout.returns, rollout.lengths
    number = _counted(len(returns), "episode") if len(returns) else f"{rollout.env_steps} steps"
    if not rewards.any():
        text = f"Every reward in {number} was 0."
    elif len(returns) > 1 and returns.unique().numel() == lengths.unique().numel() == 1:
        text = f"All {number} had the same return, {float(returns[0]):.4g}, and the same length."
    elif not len(returns) and rewards.unique().numel() == 1:
        text = f"No episode ended in {number}, and every reward was {float(rewards[0]):.4g}."
    else:
        return []
    why = "There is nothing to learn from."
    if not alike:
        why = "This rollout teaches nothing; episodes of the evaluation do differ, so later ones may."
    mend = "Reward steps towards the goal, let more episodes be tried (--num-envs), or make episodes longer "
    mend += "(--max-episode-steps, --num-steps), so that some of them reach something."
    return [Finding("nothing-to-learn", "void" if alike else "watch", f"{text} {why} {mend}")]


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"
