"""Settings of `tokenrl control`, and those of agents with a name. Imports no torch and no gymnasium.

The agents are in agents.yaml: `classic` has settings for any environment, `tuned` for some. A name only chooses
where the settings start. Every other setting may still be given, and config.json holds the settings
themselves, so a run can be repeated without the name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.names import NamesCode
from tokenrl.runs import SavingArguments, ThreadArguments, TrackerArguments
from tokenrl.settings import (
    MEASURED,
    OPEN,
    Count,
    Natural,
    NonNegative,
    Positive,
    Seed,
    Several,
    check_choice,
)


@dataclass(frozen=True)
class ControlArguments(SavingArguments, TrackerArguments, ThreadArguments):
    """Train an agent in a gymnasium environment with the same estimators as language models."""

    env: Annotated[str, NamesCode(), MEASURED] = "CartPole-v1"
    """Id of a gymnasium environment, or gridworld, trap, walk, costly_walk, bandit.
    For your own environment, name the file or module that registers it: my_envs.py:Mine-v0 or
    my_package.envs:Mine-v0.
    Observations are a Box, flattened, or Discrete, one-hot. A Box of bytes with several axes is refused, as it
    is a picture."""
    estimator: Estimator = field(
        default_factory=lambda: Estimator.preset("reinforce_timestep_mean")
    )
    """How the policy gradient is estimated from returns."""
    output_dir: str | None = None
    """Directory of the run. Default: a new one, runs/control-1,
    runs/control-2 and so on; with resume the newest of these."""
    max_steps: Annotated[Natural, MEASURED] = 100
    """Number of rollouts that are collected and trained on; 0 only evaluates."""
    num_envs: Annotated[Count, MEASURED] = 64
    """Number of environments that are stepped together."""
    num_steps: Annotated[Several, MEASURED] | None = None
    """Steps of each environment per rollout. Needs a critic, which estimates the returns that are cut off.
    Default: one whole episode of each environment."""
    max_episode_steps: Annotated[Count, MEASURED] | None = None
    """Steps after which an episode is cut. Default: the environment's own limit."""
    time_limits: Literal["bootstrap", "end"] = "bootstrap"
    """A critic estimates the rewards after a time limit, if gamma is below 1; or a time limit is an end."""
    head: Literal["auto", "softmax", "gaussian"] = "auto"
    """Distribution of actions; auto chooses by the action space."""
    action_masks: Literal["auto", "off"] = "auto"
    """auto takes only actions that the environment allows, where it says which in info["action_mask"] or by a method
    action_masks(); off takes all."""
    hidden: tuple[Count, ...] = (64,)
    """Units of each hidden layer; with no layer the policy is linear in the observations."""
    activation: Literal["tanh", "relu"] = "tanh"
    """Activation function between layers."""
    initial_weights: Literal["orthogonal", "uniform"] = "orthogonal"
    """Orthogonal, with a head near 0 and so a nearly uniform first policy; or uniform, as in PyTorch."""
    value_network: Literal["separate", "shared"] = "separate"
    """The critic is a network of its own, or one more output of the policy's layers."""
    value_coef: NonNegative = 0.5
    """Weight of a shared critic's loss, half the squared error, beside the policy's loss."""
    normalize_observations: bool = False
    """Shift and scale observations by the mean and standard deviation of all observations so far."""
    reward_scale: Positive = 1.0
    """Factor of the rewards in training, to keep a critic's targets near 1; results are not scaled."""
    learning_rate: Positive = 2e-2
    """Adam's learning rate."""
    value_learning_rate: Positive = OPEN
    """Learning rate of a separate critic. Default: learning_rate."""
    value_warmup: Natural = 0
    """Steps at the beginning in which a separate critic alone learns."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """Keep the learning rates constant, or let them fall linearly to 0 over the run."""
    entropy_schedule: Literal["constant", "linear"] = "constant"
    """Keep the estimator's entropy_coef constant, or let it fall linearly to 0 over the run."""
    max_grad_norm: NonNegative = 0.5
    """Gradients are clipped to this norm; 0: no clipping."""
    num_iterations: Count = 1
    """Number of passes over each rollout."""
    num_minibatches: Count = 1
    """Number of updates per pass, each on a part of the actions."""
    seed: Seed = 0
    """Seed of initial weights, environments and actions."""
    eval_episodes: Annotated[Count, MEASURED] = 100
    """Number of episodes per evaluation, from starting states that are never trained on."""
    eval_every: Annotated[Natural, MEASURED] = OPEN
    """Steps between evaluations; 0: only before and after training. Default: a tenth of the run."""
    stop_when_solved: bool = False
    """End the run at the first evaluation that reaches the environment's reward threshold."""
    logging_steps: Count = 10
    """Steps between two printed lines, and between records to trackers."""
    stop_after_nonfinite: Count = 5
    """Stop after this many updates in a row whose gradient is not finite."""
    load: str | None = None
    """Start from the policy that is saved in this directory."""
    allow_no_baseline: bool = False
    """Allow training without a baseline where episodes may be longer than 500 steps."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    check: bool = False
    """Try everything out without changing the weights, print all problems with their remedies, print how long
    the run will take, and stop. Exit code 0: passed, perhaps with remarks; 2: there is a problem."""
    quiet: bool = False
    """Print nothing but errors."""


AGENTS = ("classic", "tuned")

ABOUT_AGENT = (
    "Start from the settings of an agent: classic (one episode an update) fits any environment, tuned has "
    "settings for CartPole-v1, Acrobot-v1, LunarLander-v3, LunarLanderContinuous-v3, Pendulum-v1. Flags "
    "override them."
)
"""Help of the flag --agent."""


@cache
def agents() -> dict[str, dict[str, Any]]:
    """Return the settings in agents.yaml, by agent and environment."""
    import yaml

    return yaml.safe_load(Path(__file__).with_name("agents.yaml").read_text(encoding="utf-8"))


def agent_settings(agent: str, env: str) -> dict[str, Any]:
    """Return the settings that a named agent has in an environment: all that differ from the defaults.

    Args:
        agent: `classic`: one hidden layer of 16 ReLU units, Adam at 0.01, and one episode an update, whose
            returns to go are normalised over its own steps. `tuned`: settings made for this environment.
        env: id of the environment.

    Returns:
        Fields of `ControlArguments` and their values, `env` among them. Change them as you like.

    Raises:
        Refused: there is no such agent, or it has no settings for this environment.
    """
    check_choice("agent", agent, AGENTS)
    environments = agents()[agent]
    settings = environments.get(env) or environments.get("any")
    if settings is None:
        raise Refused(
            f"The agent {agent!r} has no settings for {env!r}; it has settings for {', '.join(environments)}. "
            "The agent 'classic' fits any environment."
        )
    return {"env": env, **settings, "estimator": Estimator.preset(settings["estimator"])}
