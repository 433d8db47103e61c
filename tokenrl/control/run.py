"""A control run: what it is made of, what it shows, and what is left of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from tokenrl.control.arguments import ControlSettings
from tokenrl.control.environments import Environments, Spec
from tokenrl.control.policies import Policy
from tokenrl.control.rollouts import Pieces
from tokenrl.control.saving import save_policy
from tokenrl.control.update import Agent
from tokenrl.core.entropy import entropy_collapse_message, entropy_collapsed, final_entropy
from tokenrl.core.presets import preset_name
from tokenrl.runs.outcome import Outcome
from tokenrl.runs.session import Session


@dataclass(frozen=True)
class ControlResult(Outcome):
    """What a control run came to; see `Outcome` for the other fields.

    Attributes:
        exit_reason: `finished`, `solved` (early, with stop_when_solved), `check`, `SIGTERM` or `SIGINT`.
        eval_before: mean return of fresh episodes, sampled (`reward`) and with the most probable actions
            (`reward_greedy`), before training.
        env_steps: steps of the environments learnt from.
        solved: whether `reward` after training reaches the environment's threshold; None without one.
        flags: what a reader of the numbers should know, such as `entropy-collapsed`.
        train_cpu_seconds: processor time of rollouts and updates.
        policy: the trained policy.
    """

    env_steps: int
    solved: bool | None
    flags: list[str]
    train_cpu_seconds: float
    policy: Policy = field(repr=False)

    @property
    def env_steps_per_cpu_second(self) -> float:
        """Environment steps learnt from, per second of processor time of rollouts and updates."""
        return self.env_steps / max(self.train_cpu_seconds, 1e-9)

    def summary(self) -> dict[str, Any]:
        """What summary.json says, with the rate of training if there was any."""
        rate = {"env_steps_per_second": self.env_steps_per_cpu_second} if self.env_steps else {}
        return super().summary() | rate


@dataclass
class Run:
    """What a run is made of, and how far it has come.

    Attributes:
        args: the settings, with nothing left open.
        spec: the environment's facts.
        agent: the policy and what updates it.
        envs: environments to learn from.
        eval_envs: environments to evaluate in.
        actions: random numbers of the actions.
        pieces: deals out pieces of episodes, with num_steps, once the first was asked for.
        env_steps: steps learnt from.
        cpu_seconds: processor time of rollouts and updates.
        train_seconds: the same by the clock.
        last_reward: mean return of the latest rollout in which an episode ended.
        entropies: of each update, in nats per action.
    """

    args: ControlSettings
    spec: Spec
    agent: Agent
    envs: Environments
    eval_envs: Environments
    actions: torch.Generator
    pieces: Pieces | None = None
    env_steps: int = 0
    cpu_seconds: float = 0.0
    train_seconds: float = 0.0
    last_reward: float = float("nan")
    entropies: list[float] = field(default_factory=list)

    @property
    def last_entropy(self) -> float:
        """Mean entropy over the last tenth of the updates; nan before the first."""
        return final_entropy(self.entropies)

    @property
    def title(self) -> str:
        """The run in a few words: environment, estimator, seed."""
        return f"{self.spec.env}, {preset_name(self.args.estimator)}, seed {self.args.seed}"

    def state_dict(self) -> dict[str, Any]:
        """The counts that a continuation needs, as plain numbers."""
        return {"env_steps": self.env_steps, "last_reward": self.last_reward, "entropies": self.entropies}

    def solved(self, evaluation: dict[str, float]) -> bool | None:
        """Whether an evaluation reaches the environment's threshold; None without either."""
        if self.spec.solved is None or "reward" not in evaluation:
            return None
        return evaluation["reward"] >= self.spec.solved

    def result(self, session: Session, reason: str) -> ControlResult:
        """The run as its caller gets it; `reason` says how it ended, if no signal ended it."""
        outcome = session.outcome(reason)
        return ControlResult(
            **outcome,
            env_steps=self.env_steps,
            solved=self.solved(outcome["eval_after"]),
            flags=self._flags(),
            train_cpu_seconds=self.cpu_seconds,
            policy=self.agent.policy,
        )

    def _flags(self) -> list[str]:
        if self.args.head != "softmax":  # the entropy of a density may be negative without any collapse
            return []
        collapsed = entropy_collapsed(self.args.estimator.entropy_coef, self.last_entropy)
        return ["entropy-collapsed"] if collapsed else []


def facts(run: Run) -> dict[str, Any]:
    """What the header says of a run."""
    args, spec, policy, estimator = run.args, run.spec, run.agent.policy, run.args.estimator
    own = sum(p.numel() for p in policy.policy_parameters())
    critic = sum(p.numel() for p in policy.value_parameters())
    layers = " x ".join(map(str, args.hidden)) or "linear"
    actions = f"{spec.actions} actions" if spec.discrete else f"{spec.action_size} continuous actions"
    goal = "" if spec.solved is None else f", solved at {spec.solved:g}"
    data = (
        f"one episode of up to {spec.horizon} steps" if args.num_steps is None else f"{args.num_steps} steps"
    )
    return {
        "environment": f"{spec.observation_size} observations, {actions}{goal}",
        "policy": f"{args.head}, {layers} {args.activation if args.hidden else ''}, {own:,} parameters"
        + (f", critic {critic:,}" if critic else ""),
        "estimator": f"{preset_name(estimator)}: baseline {estimator.baseline}, returns {estimator.returns}, "
        f"gamma {estimator.gamma:g}, scale {estimator.scale}, ratio {estimator.ratio}; "
        f"bias: {estimator.bias_status}",
        "step": f"{args.num_envs} environments, {data} each, learning rate {args.learning_rate:g}, "
        f"seed {args.seed}",
        "run": args.output_dir,
    }


def save(run: Run, session: Session) -> None:
    """Save a checkpoint: the policy, and the state of what the session knows."""
    session.save(
        lambda path: save_policy(run.agent.policy, path, env=run.spec.env), keep=run.args.keep_checkpoints
    )


def finish(run: Run, session: Session, ended: ControlResult) -> None:
    """Save the policy, write summary and report, and show the end."""
    session.finish(ended, lambda path: save_policy(run.agent.policy, path, env=run.spec.env))
    if "entropy-collapsed" in ended.flags:
        session.console.warn(entropy_collapse_message(run.last_entropy))
