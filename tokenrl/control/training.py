"""Trains an agent: the loop that rolls out, updates, evaluates, records and saves.

The state of environments is not saved. The starting states of each rollout follow from the seed and the
step, so a continuation of whole episodes is exact, unless an environment remembers something from one episode
to the next. Pieces of episodes (num_steps) go on in the next rollout: a continuation begins new episodes.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from dataclasses import replace
from typing import Any

from tokenrl.control.arguments import ControlArguments, agent_settings
from tokenrl.control.environments import describe
from tokenrl.control.evaluation import evaluation_metrics, film, seed_of
from tokenrl.control.policies import SavedPolicy
from tokenrl.control.rollouts import Pieces, Rollout, collect_episodes
from tokenrl.control.run import AgentRun, ControlResult, header
from tokenrl.control.setup import control_settings, prepare
from tokenrl.control.update import learn
from tokenrl.errors import Refused, describe as describe_error
from tokenrl.keywords import arguments_of_call, takes
from tokenrl.runs.console import conclude, duration
from tokenrl.runs.findings import Finding, Means, observe
from tokenrl.runs.resume import Provenance, resume_settings
from tokenrl.runs.rules import judge
from tokenrl.runs.schedules import set_rates, share_of_rate
from tokenrl.runs.session import Session
from tokenrl.runs.threads import using_threads
from tokenrl.settings import arguments
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
    if agent is None:
        args = arguments_of_call(ControlArguments, args, options)
    elif args is None:
        named = agent_settings(agent, options.get("env", ControlArguments.env))
        args = arguments(ControlArguments, named | options)
    else:
        raise Refused(
            f"agent {agent!r} was given beside finished settings; give the agent with keywords."
        )
    args = resume_settings(args, "control")
    spec = describe(args.env, args.max_episode_steps)
    args = control_settings(args, spec)
    with (
        Session("control", args, every=args.logging_steps) as session,
        contextlib.ExitStack() as stack,
    ):
        run = prepare(args, spec)
        stack.enter_context(using_threads(run.args.threads))
        saved = SavedPolicy(run.agent.policy, spec.env)
        provenance = Provenance({"initial policy": saved.fingerprint()})
        with contextlib.closing(run.envs), contextlib.closing(run.eval_envs), own_process():
            session.console.start(f"tokenrl control: {spec.env}", header(run, session.directory))
            session.open(
                run.args,
                saved,
                provenance,
                {"agent": run.agent, "run": run},
                {"threads": run.threads},
                title=f"{spec.env}, {args.estimator.preset_name}, seed {args.seed}",
                solved=spec.solved,
            )
            if args.check:
                return check_agent(run, session)
            if not session.continues:
                session.evaluated(_evaluate(run))
            elif args.num_steps is not None:
                session.console.warn(NEW_EPISODES)
            return _loop(run, session)


def _loop(run: AgentRun, session: Session) -> ControlResult:
    """Train until the last step, the first signal, or until the environment is solved."""
    args = run.args
    reached = run.solved(session.eval_before) is True
    if args.stop_when_solved and reached:
        session.end("solved")
    for step in session.steps():
        with session.update():
            metrics = _one_update(run, step)
        if session.due(args.eval_every):
            scores = _evaluate(run)
            metrics |= session.evaluated(scores)
            if run.solved(scores):
                if args.stop_when_solved:
                    session.end("solved")
                elif not reached and step < args.max_steps:
                    session.console.note(
                        f"Solved at step {step}, with a mean return of {scores['reward']:.4g}. Training goes "
                        f"on to step {args.max_steps}; with --stop-when-solved it ends here."
                    )
                reached = True
        timings = {
            "env_steps_per_second": session.rate(run.env_steps),
            "cpu_seconds": run.cpu_seconds,
        }
        session.record(metrics, timings)
    if session.owes_evaluation:
        session.evaluated(_evaluate(run))
    if args.video and not session.stop.requested:
        try:
            video = film(run.agent.policy, run.spec, session.output_dir / "videos", seed=args.seed)
            session.console.note(f"video   {video}")
        except (Exception, SystemExit) as error:  # a trained policy is not lost over a picture
            session.console.warn(f"No video could be made: {describe_error(error)}")
    ended = run.result(session)
    write = SavedPolicy(run.agent.policy, run.spec.env).write
    session.finish(ended, write, run.findings(session))
    session.console.note(ended.verdict)
    return ended


def _one_update(run: AgentRun, step: int) -> dict[str, float]:
    start = time.process_time()
    agent = run.agent
    rollout = _collect(run, step)
    args = run.args
    share = share_of_rate(args.learning_rate_schedule, step - 1, args.max_steps)
    set_rates(agent.optimizer, share)
    metrics = learn(agent, rollout, step)
    run.env_steps += rollout.env_steps
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
        return collect_episodes(run.envs, policy, run.spec.horizon, run.actions, seed=seed)
    if run.pieces is None:
        run.pieces = Pieces(run.envs, args.num_steps, seed=seed)
    return run.pieces.collect(policy, run.actions)


def _evaluate(run: AgentRun) -> dict[str, float]:
    return evaluation_metrics(run.agent.policy, run.eval_envs, run.spec, seed=run.args.seed)


LOWEST_RATE = 1e-3
HIGHEST_RATE = 2e-2
"""Adam's usual learning rates for agents, from deep networks to small ones (see `TUNED` and the default)."""
SMALLEST_INPUT = 0.1
LARGEST_INPUT = 10
"""A network learns well if the largest absolute value of the observations lies between these."""


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
    session.evaluated(_evaluate(run))
    evaluation_end = time.perf_counter()
    rollout = _collect(run, 1)
    norm = learn(copy.deepcopy(run.agent), rollout, 1)["grad_norm"]
    update_seconds = time.perf_counter() - evaluation_end
    rewards = rollout.returns
    unit = "episodes"
    groups = f"{len(rewards)} episodes"
    if not len(rewards):
        rewards = rollout.rewards[rollout.mask]
        unit = "steps"
        groups = f"{len(rewards)} steps, in which no episode ended,"
    low = float(rewards.min())
    high = float(rewards.max())
    largest = float(rollout.observations[rollout.mask].abs().max())
    evaluations = 2
    if args.eval_every:
        evaluations = 1 + math.ceil(args.max_steps / args.eval_every)
    seconds = args.max_steps * update_seconds + evaluations * (evaluation_end - start)
    measurements = {
        "returns": f"{low:.4g} to {high:.4g} in {len(rewards)} {unit}",
        "observations": f"{largest:.3g} at most, in absolute value",
        "learning rate": f"{args.learning_rate:g}",
        "time": f"{update_seconds:.2g} s per update, about {duration(seconds)} for {args.max_steps} updates "
        f"and {evaluations} evaluations, if episodes stay as long as now",
    }
    # Episodes of different lengths can be told apart although their returns are equal.
    equal = len(rewards) > 1 and low == high and rollout.lengths.unique().numel() <= 1
    is_equal = equal or not rollout.rewards[rollout.mask].any()
    observed = replace(
        observe([], args),
        lowest_rate=LOWEST_RATE,
        highest_rate=HIGHEST_RATE,
        skipped=float(not math.isfinite(norm)),
        step=Means(reward=low, equal=float(is_equal)),
        groups=groups,
        others_differ=session.eval_before["reward_stderr"] > 0,
    )
    findings = judge(observed)
    if not (SMALLEST_INPUT <= largest <= LARGEST_INPUT or args.normalize_observations):
        text = (
            f"The largest absolute value of an observation was {largest:.3g}, and networks learn best from "
            "inputs near 1. Add --normalize-observations, or scale them in the environment."
        )
        findings.append(Finding("observations-far-from-1", "watch", text))
    conclude(session, "environment, policy and estimator", measurements, findings)
    return replace(run.result(session), flags=session.flags)
