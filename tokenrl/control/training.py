"""The loop of control: evaluate, roll out, learn, record, save, stop. It mirrors the language side's."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tokenrl.control import recording
from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import describe
from tokenrl.control.evaluation import evaluation_metrics, film, seed_of
from tokenrl.control.policies import Policy
from tokenrl.control.rollouts import Pieces, Rollout, collect_episodes
from tokenrl.control.setup import Run, arguments, check_settings, prepare, resolve
from tokenrl.control.update import learn
from tokenrl.core import rules
from tokenrl.errors import Stopped
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.metrics import MetricsLog
from tokenrl.runs.signals import GracefulStop


@dataclass(frozen=True)
class ControlResult:
    """What a run came to.

    Attributes:
        output_dir: the run directory.
        exit_reason: `finished`, `solved` (early, with stop_when_solved), `check`, `SIGTERM` or `SIGINT`.
        exit_code: 0, or 128 plus the signal's number.
        steps: updates.
        env_steps: steps of the environments learnt from.
        eval_before: mean return of fresh episodes, sampled (`reward`) and with the most probable actions
            (`reward_greedy`), before training.
        eval_after: the same after it; empty if a signal ended the run between two evaluations.
        solved: whether `reward` after training reaches the environment's threshold; None without one.
        flags: what a reader of the numbers should know, such as `entropy-collapsed`.
        train_cpu_seconds: processor time of rollouts and updates.
        wall_seconds: from the first evaluation to the last.
        policy: the trained policy.
    """

    output_dir: Path
    exit_reason: str
    exit_code: int
    steps: int
    env_steps: int
    eval_before: dict[str, float]
    eval_after: dict[str, float]
    solved: bool | None
    flags: list[str]
    train_cpu_seconds: float
    wall_seconds: float
    policy: Policy = field(repr=False)

    @property
    def env_steps_per_cpu_second(self) -> float:
        """Environment steps learnt from, a second of processor time of rollouts and updates."""
        return self.env_steps / max(self.train_cpu_seconds, 1e-9)


def train(args: ControlArguments | None = None, **options: Any) -> ControlResult:
    """Train an agent by policy gradients; the keywords are the fields of `ControlArguments`.

    Args:
        args: all settings at once.
        **options: or some of them; `estimator` may be a preset's name.

    Raises:
        Refused: something was unusable before the first update.
        Stopped: the run could not go on; what was saved stays.

    Example:
        >>> from tokenrl.control.training import train
        >>> train(env="CartPole-v1", output_dir="runs/cartpole").eval_after["reward_greedy"]
    """
    args = args or arguments(options)
    check_settings(args)
    spec = describe(args.env, args.max_episode_steps)
    args = resolve(args, spec)
    directory = RunDirectory.create(args.output_dir, overwrite=args.overwrite)
    run, threads = None, torch.get_num_threads()
    torch.set_num_threads(1)  # layers this small lose more to threads that wait for each other than they gain
    try:
        run = prepare(args, spec, directory)
        return _run(run)
    finally:
        torch.set_num_threads(threads)
        if run is not None:
            run.envs.close()
            run.eval_envs.close()
        directory.release()


def _run(run: Run) -> ControlResult:
    args, console = run.args, run.console
    console.start(f"tokenrl control: {run.spec.env}", recording.facts(args, run.spec, run.agent.policy))
    began = time.monotonic()
    with GracefulStop(quiet=args.quiet) as stop:
        before = _evaluate(run)
        if args.check:
            console.note("Check passed: environment, policy and estimator work together. Nothing trained.")
            return _result(run, "check", 0, before, before, began)
        run.directory.write_config(recording.config(args, run.spec))
        run.log = MetricsLog(run.directory.metrics, run.directory.timings)
        run.log.write(0, {"eval_" + name: value for name, value in before.items()})
        try:
            after, solved = _loop(run, before, stop)
        except Stopped as error:
            _result(run, "failed", 1, before, {}, began, write=True)
            raise recording.failed(run.directory, error) from error
    reason = {143: "SIGTERM", 130: "SIGINT"}.get(stop.exit_code, "solved" if solved else "finished")
    if args.video and not stop.requested:
        folder = run.directory.path / "videos"
        made = film(run.agent.policy, run.spec, folder, seed=args.seed)
        console.note(f"video   {made}")
    return _result(run, reason, stop.exit_code, before, after, began, write=True)


def _loop(run: Run, before: dict[str, float], stop: GracefulStop) -> tuple[dict[str, float], bool]:
    """Train to the last update, the first signal, or the solution; returns the last evaluation."""
    args, found, evaluated = run.args, before, 0
    solved = args.stop_when_solved and _solved(run, before) is True
    with run.console.progress(args.max_steps) as progress:
        while run.step < args.max_steps and not stop.requested and not solved:
            metrics = _one_update(run)
            if run.step == args.max_steps or (args.eval_every and run.step % args.eval_every == 0):
                found, evaluated = _evaluate(run), run.step
                metrics |= {"eval_" + name: value for name, value in found.items()}
                solved = args.stop_when_solved and _solved(run, found) is True
            recording.record(run, progress, metrics)
            if args.save_every and run.step % args.save_every == 0:
                recording.save(run)
    if evaluated == run.step:
        return found, solved
    return ({} if stop.requested else _evaluate(run)), solved


def _one_update(run: Run) -> dict[str, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    agent = run.agent
    _set_learning_rates(run)
    rollout = _collect(run)
    run.step += 1
    metrics = learn(agent, rollout, run.step)
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
    run.entropies.append(metrics["entropy"])
    run.cpu_seconds += time.process_time() - cpu
    run.train_seconds += time.perf_counter() - wall
    return metrics


def _collect(run: Run) -> Rollout:
    args = run.args
    if args.num_steps is None:
        start = seed_of(args.seed, 0) if run.step == 0 else None
        return collect_episodes(run.envs, run.agent.policy, run.spec.horizon, run.actions, seed=start)
    if run.pieces is None:
        run.pieces = Pieces(run.envs, args.num_steps, seed=seed_of(args.seed, 0))
    return run.pieces.collect(run.agent.policy, run.actions)


def _set_learning_rates(run: Run) -> None:
    if run.args.learning_rate_schedule == "constant":
        return
    left = 1 - run.step / run.args.max_steps
    for optimizer in (run.agent.optimizer, run.agent.value_optimizer):
        for group in optimizer.param_groups if optimizer is not None else ():
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * left


def _evaluate(run: Run) -> dict[str, float]:
    return evaluation_metrics(run.agent.policy, run.eval_envs, run.spec, seed=run.args.seed)


def _solved(run: Run, found: dict[str, float]) -> bool | None:
    if run.spec.solved is None or "reward" not in found:
        return None
    return found["reward"] >= run.spec.solved


def _flags(run: Run) -> list[str]:
    if run.args.head != "softmax":  # the entropy of a density may be negative without any collapse
        return []
    collapsed = rules.entropy_collapsed(run.args.estimator.entropy_coef, run.last_entropy)
    return ["entropy-collapsed"] if collapsed else []


def _result(
    run: Run, reason: str, code: int, before: dict[str, float], after: dict[str, float], began: float,
    *, write: bool = False,
) -> ControlResult:  # fmt: skip
    ended = ControlResult(
        output_dir=run.directory.path,
        exit_reason=reason,
        exit_code=code,
        steps=run.step,
        env_steps=run.env_steps,
        eval_before=before,
        eval_after=after,
        solved=_solved(run, after),
        flags=_flags(run),
        train_cpu_seconds=run.cpu_seconds,
        wall_seconds=time.monotonic() - began,
        policy=run.agent.policy,
    )
    if write:
        recording.finish(run, recording.summary(ended))
    return ended
