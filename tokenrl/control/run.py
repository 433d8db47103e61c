"""Holds the parts of a control run, its header, and its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Environments, Spec
from tokenrl.control.policies import Policy
from tokenrl.control.rollouts import Pieces
from tokenrl.control.update import Agent
from tokenrl.core.bias import estimator_line, objective_line
from tokenrl.runs import Finding, Outcome, Session, judge, measured, observe, reaches

SHOWN = ("baseline", "returns", "gamma", "scale", "ratio")
"""The axes that the header of a run shows, whatever they are."""
PROGRESS = ("env_steps", "cpu_seconds", "last_reward")
"""The fields of an `AgentRun` that a checkpoint holds, beside the random numbers of the actions."""


@dataclass(frozen=True, repr=False)
class ControlResult(Outcome):
    """The result of a control run; see `Outcome` for the other fields.

    Attributes:
        exit_reason: `finished`, `solved` (early, with stop_when_solved), `check`, `SIGTERM` or `SIGINT`.
        eval_before: before training, the mean return of evaluation episodes with sampled actions (`reward`)
            and with the most probable ones (`reward_greedy`).
        env_steps: number of environment steps that were trained on.
        solved: whether `reward` after training reaches the environment's threshold; None without a threshold,
            or if a signal ended the run before its evaluation.
        threshold: the mean return from which the environment counts as solved; None if it names none.
        verdict: `solved` in words, with the numbers that it rests on.
        flags: warnings about the result, such as `entropy-collapsed`; of a check, a short name for each
            problem and then for each remark.
        train_cpu_seconds: processor time of rollouts and updates.
        train_seconds: wall-clock time of rollouts and updates.
        policy: the trained policy.
    """

    env_steps: int
    solved: bool | None
    threshold: float | None
    verdict: str
    flags: list[str]
    train_cpu_seconds: float
    train_seconds: float
    policy: Policy = field(repr=False)

    def summary(self) -> dict[str, Any]:
        """Return the content of summary.json, with the rate of training (by the clock) if there was any."""
        summary = super().summary()
        if self.env_steps:
            summary["env_steps_per_second"] = self.env_steps / self.train_seconds
        return summary


@dataclass
class AgentRun:
    """The parts of a run, and its progress.

    Attributes:
        args: the settings, none of which is open but for the directory.
        spec: the facts about the environment.
        agent: the policy with everything that updates change.
        envs: environments for training.
        eval_envs: environments for evaluation.
        actions: random numbers of the actions.
        threads: the number of threads of torch, and in words where it comes from.
        pieces: collects pieces of episodes; only with `num_steps`, from the first rollout on.
        env_steps: number of environment steps trained on so far.
        cpu_seconds: processor time of rollouts and updates.
        last_reward: mean return of the latest rollout in which an episode ended.
    """

    args: ControlArguments
    spec: Spec
    agent: Agent
    envs: Environments
    eval_envs: Environments
    actions: torch.Generator
    threads: str
    pieces: Pieces | None = None
    env_steps: int = 0
    cpu_seconds: float = 0.0
    last_reward: float = math.nan

    def findings(self, session: Session) -> list[Finding]:
        """Return what the rules say of the entropy of the last tenth of the updates, and of greedy episodes."""
        observed = observe(session.rows, self.args)
        is_solved = bool(self.solved(session.evaluation))
        return judge(replace(observed, is_solved=is_solved), "entropy-collapsed", "greedy-fell")

    def state_dict(self) -> dict[str, Any]:
        """Return the progress and the random numbers, with which the run continues.

        Environments have no state here: a rollout of whole episodes is reset with a seed from its step.
        """
        return {name: getattr(self, name) for name in PROGRESS} | {
            "actions": self.actions.get_state()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for name in PROGRESS:
            setattr(self, name, state[name])
        self.actions.set_state(state["actions"])

    def solved(self, evaluation: dict[str, float]) -> bool | None:
        """Return whether an evaluation reaches the environment's threshold; None if either is missing."""
        if self.spec.solved is None or "reward" not in evaluation:
            return None
        return bool(reaches(evaluation["reward"], self.spec.solved))

    def result(self, session: Session) -> ControlResult:
        """Return the result of the run."""
        outcome = session.outcome()
        return ControlResult(
            **outcome,
            env_steps=self.env_steps,
            solved=self.solved(outcome["eval_after"]),
            threshold=self.spec.solved,
            verdict=verdict(self.spec, outcome["eval_after"], self.args.eval_episodes),
            flags=[finding.flag for finding in self.findings(session)],
            train_cpu_seconds=self.cpu_seconds,
            train_seconds=session.training_seconds,
            policy=self.agent.policy,
        )


def verdict(spec: Spec, evaluation: Mapping[str, float], episodes: int) -> str:
    """Return in words whether an environment is solved, and by which numbers.

    Args:
        spec: the environment, with its threshold if it has one.
        evaluation: metrics of the evaluation of the trained policy; empty if there was none.
        episodes: number of episodes of that evaluation.
    """
    goal = f"{spec.env} has no threshold" if spec.solved is None else f"threshold {spec.solved:g}"
    if "reward" not in evaluation:
        return f"not evaluated: the run was ended before its evaluation; {goal}"
    mean = evaluation["reward"]
    error = evaluation["reward_stderr"]
    greedy = measured(evaluation["reward_greedy"], evaluation["reward_greedy_stderr"])
    result = (
        f"mean return {measured(mean, error)} of {episodes} fresh episodes, {goal} "
        f"(with the most probable actions {greedy})"
    )
    if spec.solved is None:
        return result
    if abs(mean - spec.solved) < 2 * error:
        result += (
            "; the threshold is within two standard errors, so more episodes may decide otherwise"
        )
    return f"solved: {result}" if reaches(mean, spec.solved) else f"not solved: {result}"


def header(run: AgentRun, directory: str) -> dict[str, Any]:
    """Return what the header shows of a run in a directory, by name."""
    args = run.args
    spec = run.spec
    estimator = args.estimator
    kind = "actions" if spec.discrete else "continuous actions"
    if spec.masked:
        kind += ", masked" if run.agent.policy.shape.action_masks else ", masks off"
    layers = " x ".join(map(str, args.hidden)) or "no hidden layer"
    size = sum(parameter.numel() for parameter in run.agent.policy.parameters())
    status = estimator_line(estimator, SHOWN, estimator.bias_status)
    pieces = f"{args.num_steps or 'an episode of up to ' + str(spec.horizon)} steps"
    return {
        "environment": f"{spec.observation_size} observations, {spec.actions or spec.action_size} {kind}",
        "policy": f"{args.head}, {layers}, {args.activation}, {size:,} parameters",
        "estimator": f"{estimator.preset_name}: {status}",
        **objective_line(estimator),
        "step": f"{args.num_envs} environments, {pieces} each, learning rate {args.learning_rate:g}, "
        f"seed {args.seed}",
        "run": directory,
    }
