"""Trains an agent: the loop that rolls out, updates, evaluates, records and saves.

The state of environments is not saved. The starting states of each rollout follow from the seed and the
step, so a continuation of whole episodes is exact, unless an environment remembers something from one episode
to the next. Pieces of episodes (num_steps) go on in the next rollout: a continuation begins new episodes.
"""

from __future__ import annotations

import copy
import math
import time
from contextlib import closing
from dataclasses import replace
from typing import Any

from tokenrl.control.arguments import ControlArguments, agent_settings
from tokenrl.control.environments import describe
from tokenrl.control.evaluation import evaluation_metrics, seed_of
from tokenrl.control.rollouts import Pieces, Rollout, collect_episodes
from tokenrl.control.run import AgentRun, ControlResult, header
from tokenrl.control.setup import control_settings, prepare
from tokenrl.control.update import learn
from tokenrl.core.schedules import set_rates, share_of_rate
from tokenrl.errors import Stopped
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.runs import (
    Means,
    Provenance,
    Session,
    duration,
    judge,
    observe,
    resume_settings,
    using_threads,
)
from tokenrl.user_code import own_process

NEW_EPISODES = (
    "The continuation begins new episodes, because with num_steps episodes go on from one rollout to the "
    "next and are not saved. Its numbers can be repeated, but are not those of an uninterrupted run."
)


@takes(ControlArguments)
def train_agent(
    args: ControlArguments | None = None, *, agent: str | None = None, **options: Any
) -> ControlResult:
    """Train an agent by policy gradients; the keywords are the fields of `ControlArguments`.

    Args:
        args: all settings as one object.
        agent: `classic` or `tuned`: start from this agent's settings (see `agent_settings`).
        **options: the settings that differ from the agent, or without an agent from the defaults; `estimator`
            may be the name of a preset.

    Returns:
        The result of the run, with the trained policy and its evaluations.

    Raises:
        Refused: a setting cannot be used; raised before the first update.
        Stopped: the run failed; its checkpoints stay.

    Example:
        >>> from tokenrl import train_agent
        >>> train_agent(env="CartPole-v1", output_dir="runs/cartpole").eval_after["reward_greedy"]
        >>> train_agent(agent="classic", env="Acrobot-v1", hidden=(32,), output_dir="runs/acrobot").verdict
    """
    if agent is not None:
        options = agent_settings(agent, options.get("env", ControlArguments.env)) | options
    args = resume_settings(arguments_of_call(ControlArguments, args, options), "control")
    spec = describe(args.env, args.max_episode_steps)
    args = control_settings(args, spec)
    with Session("control", args, every=args.logging_steps) as session:
        run = prepare(args, spec)
        policy = run.agent.policy
        threads = using_threads(run.args.threads)
        with threads, closing(run.envs), closing(run.eval_envs), own_process():
            session.console.start(f"tokenrl control: {spec.env}", header(run, session.directory))
            session.open(
                run.args,
                policy,
                Provenance({"initial policy": policy.fingerprint()}),
                {"agent": run.agent, "run": run},
                {"threads": run.threads},
                title=f"{spec.env}, {args.estimator.preset_name}, seed {args.seed}",
                solved=spec.solved,
            )
            if args.check:
                return check_agent(run, session)
            if not session.continues:
                _evaluate(run, session)
            elif args.num_steps is not None:
                session.console.warn(NEW_EPISODES)
            return _loop(run, session)


def _loop(run: AgentRun, session: Session) -> ControlResult:
    """Train until the last step, the first signal, or until the environment is solved."""
    for step in session.steps():
        with session.update():
            metrics = _one_update(run, step)
        if session.due(run.args.eval_every):
            metrics |= _evaluate(run, session)
        timings = {
            "env_steps_per_second": session.rate(run.env_steps),
            "cpu_seconds": run.cpu_seconds,
        }
        session.record(metrics, timings)
    if session.owes_evaluation:
        _evaluate(run, session)
    ended = run.result(session)
    session.finish(ended, run.agent.policy.write, run.findings(session))
    session.console.note(ended.verdict)
    return ended


def _evaluate(run: AgentRun, session: Session) -> dict[str, float]:
    """Record an evaluation, and with `stop_when_solved` end the run where it reaches the threshold."""
    scores = _scores(run)
    recorded = session.evaluated(scores)
    if run.args.stop_when_solved and run.solved(scores):
        session.end("solved")
    return recorded


def _scores(run: AgentRun) -> dict[str, float]:
    """Return the metrics of an evaluation.

    Raises:
        Stopped: the environment failed, or gave the first mask of actions after a step.
    """
    scores = evaluation_metrics(run.agent.policy, run.eval_envs, seed=run.args.seed)
    if run.args.action_masks == "auto" and run.eval_envs.gives_masks > run.spec.masked:
        raise Stopped(
            f"The environment {run.spec.env} gives masks of actions from step() and none from reset(). Correct it, "
            "or set action_masks 'off'."
        )
    return scores


def _one_update(run: AgentRun, step: int) -> dict[str, float]:
    start = time.process_time()
    agent = run.agent
    rollout = _collect(run, step)
    args = run.args
    share = share_of_rate(args.learning_rate_schedule, step - 1, args.max_steps)
    set_rates(agent.optimizer, share)
    metrics = learn(agent, rollout, step)
    run.env_steps += int(rollout.mask.sum())
    if len(rollout.returns):
        run.last_reward = float(rollout.returns.mean())
        metrics["reward_std"] = float(rollout.returns.std(correction=0))
        metrics["episode_length"] = float(rollout.lengths.double().mean())
    metrics |= {
        "reward": run.last_reward,  # of the latest rollout in which an episode ended
        "episodes": len(rollout.returns),
        "num_env_steps": run.env_steps,
        "learning_rate": agent.optimizer.param_groups[0]["lr"],
        "skipped_steps": agent.skipped,
    }
    run.cpu_seconds += time.process_time() - start
    return metrics


def _collect(run: AgentRun, step: int) -> Rollout:
    """Collect the rollout of a step; the starting states of its episodes follow from the seed and the step.

    Pieces of episodes go on from one rollout to the next. Only the first rollout of a run, or of its
    continuation, starts them anew.
    """
    args = run.args
    policy = run.agent.policy
    seed = seed_of(args.seed, 0, step - 1)
    if args.num_steps is None:
        return collect_episodes(run.envs, policy, run.actions, seed=seed)
    if run.pieces is None:
        run.pieces = Pieces(run.envs, args.num_steps, seed=seed)
    return run.pieces.collect(policy, run.actions)


LOWEST_RATE = 1e-3
HIGHEST_RATE = 2e-2
"""Adam's usual learning rates for agents, from deep networks to small ones (see agents.yaml and the default)."""


def check_agent(run: AgentRun, session: Session) -> ControlResult:
    """Check a run whose parts are ready, print the findings, and return the result.

    The run begins with an evaluation, a rollout, and an update of a copy: its policy and its critic stay as
    they are, bit for bit.

    Args:
        run: the run.
        session: the session, which has been opened.

    Returns:
        The result, with exit code 2 if there is a problem, else 0; its `flags` name problems and remarks.

    Raises:
        Stopped: the environment failed.
    """
    args = run.args
    start = time.perf_counter()
    session.evaluated(_scores(run))
    evaluation_seconds = time.perf_counter() - start
    rollout = _collect(run, 1)
    trial = copy.deepcopy(run.agent)
    trial.args = replace(args, value_warmup=0)  # so that the policy is updated too
    norm = learn(trial, rollout, 1)["grad_norm"]
    update_seconds = time.perf_counter() - start - evaluation_seconds
    returns = rollout.rewards.sum(1)  # of episodes, or of pieces of them
    low, high = returns.aminmax()
    groups = f"{len(returns)} {'episodes' if args.num_steps is None else 'pieces of episodes'}"
    evaluations = 1 + math.ceil(args.max_steps / (args.eval_every or args.max_steps or 1))
    seconds = args.max_steps * update_seconds + evaluations * evaluation_seconds
    measurements = {
        "returns": f"{low:.4g} to {high:.4g} in {groups}",
        "observations": f"{rollout.observations.abs().max():.3g} at most, in absolute value; networks learn best "
        "from numbers near 1 (--normalize-observations)",
        "time": f"{update_seconds:.2g} s per update, about {duration(seconds)} for {args.max_steps} updates "
        f"and {evaluations} evaluations, if episodes stay as long as now",
    }
    # Episodes of different lengths can be told apart although their returns are equal.
    equal = len(returns) > 1 and low == high and rollout.mask.all()
    is_equal = equal or not rollout.rewards.any()
    observed = replace(
        observe([], args),
        lowest_rate=LOWEST_RATE,
        highest_rate=HIGHEST_RATE,
        skipped=float(not math.isfinite(norm)),
        step=Means(reward=float(low), equal=float(is_equal)),
        groups=groups,
        others_differ=session.eval_before["reward_stderr"] > 0,
    )
    session.conclude("environment, policy and estimator", measurements, judge(observed))
    return replace(run.result(session), flags=session.flags)
