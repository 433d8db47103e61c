"""The settings of agents with a name: `classic` for any environment, `tuned` for those in `TUNED`.

A name only chooses where the settings start. Every other setting may still be given, and config.json holds
the settings themselves, so a run can be repeated without the name. Imports no torch and no gymnasium.
"""

from __future__ import annotations

from typing import Any

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.settings import check_choice

AGENTS = ("classic", "tuned")

# The agent of textbooks. Each episode is a batch of its own: the discounted returns to go of its steps,
# shifted to mean 0 and divided by their standard deviation, weight the scores of its actions. Mean and
# deviation contain the results of the very actions that they judge, which biases the gradient
# (`core/choices.py` says towards what), and an episode is never compared with another one.
CLASSIC: dict[str, Any] = {
    "estimator": Estimator(
        baseline="episode_mean", scale="episode_std", scale_eps=1e-8, returns="reward_to_go", gamma=0.99
    ),
    "hidden": (16,),
    "activation": "relu",
    "learning_rate": 0.01,
    "num_envs": 1,
    "max_grad_norm": 0.0,
}
CLASSIC_EPISODES = {"CartPole-v1": 400, "Acrobot-v1": 300, "LunarLander-v3": 1000}
"""Episodes that the classic agent trains on, by environment; one episode is one update."""
OTHER_EPISODES = 1000
"""Episodes of the classic agent in an environment that `CLASSIC_EPISODES` does not list."""

# The parts of PPO: the critic and GAE (lam) make credit local. A discount bounds how far ahead the critic
# must see, and lets a time limit be bootstrapped. The clipped ratio allows several passes over the same
# steps. Pieces of episodes keep slow environments busy. An entropy bonus keeps the lander from hovering too
# early; it falls to 0, because the policy is evaluated with sampled actions. A falling learning rate
# removes the noise of the last updates.
PPO: dict[str, Any] = {
    "num_envs": 16,
    "num_iterations": 4,
    "learning_rate_schedule": "linear",
}
LANDER: dict[str, Any] = PPO | {
    "estimator": Estimator.preset("ppo", gamma=0.999, lam=0.98, entropy_coef=0.01, value_clip=None),
    "num_steps": 512,
    "num_minibatches": 16,
    "learning_rate": 1e-3,
    "hidden": (64, 64),
    "reward_scale": 0.02,  # returns of some hundreds become targets of size 1 for the critic
    "entropy_schedule": "linear",
    "max_steps": 200,
}
TUNED: dict[str, dict[str, Any]] = {
    # Short episodes that all start alike: the mean of the other episodes at the same step needs no critic.
    "CartPole-v1": {"max_steps": 60},
    "Acrobot-v1": PPO
    | {
        "estimator": Estimator.preset("ppo", gamma=0.99, lam=0.94),
        "num_steps": 256,
        "num_minibatches": 4,
        "learning_rate": 3e-3,
        "max_steps": 50,
    },
    "LunarLander-v3": LANDER,
    "LunarLanderContinuous-v3": LANDER | {"hidden": (128, 128)},
    "Pendulum-v1": PPO
    | {
        "estimator": Estimator.preset("ppo", gamma=0.9, lam=0.95, value_clip=None),
        "num_steps": 256,
        "num_iterations": 10,
        "num_minibatches": 8,
        "learning_rate": 1e-3,
        "hidden": (128, 128),
        "reward_scale": 0.1,
        "max_steps": 50,
    },
}
"""The settings of the tuned agent by environment."""

ABOUT_AGENT = (
    "Start from the settings of an agent: classic (one episode an update) fits any environment, tuned has "
    f"some for {', '.join(TUNED)}. Flags override them."
)
"""Help of the flag --agent."""


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
    if agent == "classic":
        return {"env": env, **CLASSIC, "max_steps": CLASSIC_EPISODES.get(env, OTHER_EPISODES)}
    if env not in TUNED:
        some = f"it has some for {', '.join(TUNED)}. The agent 'classic' fits any environment."
        raise Refused(f"The agent 'tuned' has no settings for {env!r}; {some}")
    return {"env": env, **TUNED[env]}
