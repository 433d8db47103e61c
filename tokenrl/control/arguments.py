"""Settings of `tokenrl control`. Imports no torch and no gymnasium."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tokenrl.core.estimator import Estimator
from tokenrl.settings import Bounds, Count, Natural, NonNegative, Positive, Settings


@dataclass(frozen=True)
class ControlArguments(Settings):
    """Train an agent on a gymnasium environment with the estimators of the language side."""

    env: str = "CartPole-v1"
    """Gymnasium id, or gridworld, walk, bandit."""
    estimator: Estimator = field(default_factory=lambda: Estimator.preset("reinforce_timestep_mean"))
    """How returns become a gradient."""
    output_dir: str = "runs/control"
    """Directory of the run."""
    max_steps: Natural = 100
    """Updates (rollouts learnt from); 0 only evaluates."""
    num_envs: Count = 64
    """Environments stepped together."""
    num_steps: Annotated[int, Bounds(at_least=2)] | None = None
    """Steps of each environment an update; needs a critic to stand in for what is cut off. Default: one whole
    episode each."""
    max_episode_steps: Count | None = None
    """Steps after which an episode is cut. Default: the environment's own limit."""
    head: Literal["auto", "softmax", "gaussian"] = "auto"
    """Distribution of actions; auto goes by the action space."""
    hidden: tuple[Count, ...] = (64,)
    """Units of each hidden layer; none for a policy linear in the observations."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Between layers."""
    value_network: Literal["separate", "shared"] = "separate"
    """A critic of its own, or one more output of the policy's layers."""
    value_coef: NonNegative = 0.5
    """Weight of the critic's loss beside the policy's."""
    normalize_observations: bool = False
    """Shift and scale observations by the mean and standard deviation of those seen so far."""
    reward_scale: Positive = 1.0
    """What training multiplies rewards by, so that a critic's targets are of size 1; results are unscaled."""
    learning_rate: Positive = 2e-2
    """Adam's learning rate."""
    value_learning_rate: Positive | None = None
    """Of a separate critic. Default: learning_rate."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """Keep the learning rates, or let them fall to 0 over the run."""
    entropy_schedule: Literal["constant", "linear"] = "constant"
    """Keep the estimator's entropy_coef, or let it fall to 0 over the run."""
    max_grad_norm: NonNegative = 0.5
    """Largest gradient norm; 0 clips nothing."""
    num_iterations: Count = 1
    """Passes over each rollout."""
    num_minibatches: Count = 1
    """Updates a pass, each on a share of the actions."""
    seed: Natural = 0
    """Seed of weights, environments and actions."""
    eval_episodes: Count = 100
    """Fresh episodes of each evaluation, from starting states never trained on."""
    eval_every: Natural | None = None
    """Updates between evaluations. Default: a tenth of the run; 0: only before and after."""
    stop_when_solved: bool = False
    """End at the first evaluation that reaches the environment's reward threshold."""
    diagnostics_every: Natural = 0
    """Updates between measurements of the gradient's signal and noise; 0: none."""
    save_every: Natural = 0
    """Updates between checkpoints; 0: none but the final policy."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept."""
    logging_steps: Count = 10
    """Updates between lines on a screen that is no terminal."""
    stop_after_nonfinite: Count = 5
    """Stop after so many updates in a row with a gradient that is not finite."""
    load: str | None = None
    """Start from the policy in this directory."""
    video: bool = False
    """Film one episode of the trained policy into videos/."""
    allow_no_baseline: bool = False
    """Train without a baseline also where episodes are longer than 500 steps."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    check: bool = False
    """Do everything up to the first update, report, and stop."""
    quiet: bool = False
    """Print nothing but errors."""


@dataclass(frozen=True, kw_only=True)
class ControlSettings(ControlArguments):
    """The arguments of a run, in which nothing is left open."""

    head: Literal["softmax", "gaussian"]
    value_learning_rate: Positive
    eval_every: Natural
