"""REINFORCE in NumPy without autodiff: one hidden layer, a gradient by hand, RMSProp, whole episodes.

The policy chooses between two actions, `P(1 | x) = sigmoid(w2 . relu(W1 x + b1) + b2)`. Its score in the
logit z is `d log P(a) / dz = a - P(1)`; the rest is the chain rule. The score of each action is multiplied by
its advantage: the discounted return from that action on, minus the mean of these returns over the
episode's timesteps, divided by their standard deviation. Among the estimators of `tokenrl.core` this is

    Estimator(baseline="episode_mean", scale="episode_std", scale_ddof=0, scale_eps=1e-8,
              returns="reward_to_go", gamma=0.99)

and its `bias_status` is "biased": mean and standard deviation of the episode depend on the actions that they
are used for, and discounting from each action on is the gradient of no objective. It works well all the same
in tasks whose episodes end in failure, because early actions then get positive advantages and late ones
negative. An episode that the time limit truncates is treated as if it had terminated, so that its last
actions get negative advantages without having done anything wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeAlias

import numpy as np

from tokenrl.control.failures import check_finite, failed, refusing
from tokenrl.errors import Refused
from tokenrl.settings import Bounds, Count, Positive, Seed, Settings

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclass(frozen=True)
class NumpySettings(Settings):
    """Settings of the agent; the defaults learn CartPole-v1."""

    env: str = "CartPole-v1"
    """An environment, as for `tokenrl control`, with a vector of observations and two actions."""
    hidden: Count = 100
    """Number of hidden units (ReLU)."""
    gamma: Annotated[float, Bounds(at_least=0, at_most=1)] = 0.99
    """Discount per step; with 0.99 a reward 100 steps later counts 0.99^100 = 0.37."""
    window: Count | None = None
    """Credit each reward only to this many actions before it (the blame window); None: to all of them."""
    standardise: bool = True
    """Subtract the mean of the episode's returns to go and divide by their standard deviation."""
    episodes_per_update: Count = 5
    """Whole episodes a step of RMSProp."""
    learning_rate: Positive = 1e-3
    """About how far a weight moves in one update, because RMSProp divides by the size of the gradient."""
    decay: Annotated[float, Bounds(at_least=0, below=1)] = 0.99
    """Decay per update of RMSProp's running mean of squared gradients."""
    epsilon: Positive = 1e-5
    """Added to the root of that mean, to avoid division by 0."""
    seed: Seed = 0
    """Seed of initial weights, sampled actions and environment."""


class Weights(NamedTuple):
    """Weights of H hidden units over observations of length D; a gradient has the same four parts."""

    w1: Array  # [H, D]
    b1: Array  # [H]
    w2: Array  # [H]
    b2: Array  # [1]


class Episode(NamedTuple):
    """Observations, actions and rewards of T steps."""

    observations: Array  # [T, D]
    actions: Array  # [T], 0 or 1
    rewards: Array  # [T]


def initial_weights(observations: int, hidden: int, generator: np.random.Generator) -> Weights:
    """Draw normal weights whose variance is 1 over the number of inputs; biases start at 0."""
    w1 = generator.standard_normal((hidden, observations)) / np.sqrt(observations)
    w2 = generator.standard_normal(hidden) / np.sqrt(hidden)
    return Weights(w1, np.zeros(hidden), w2, np.zeros(1))


def forward(weights: Weights, observations: Array) -> tuple[Array, Array]:
    """Return the hidden layer [T, H] and P(1) [T]; for one observation [D], they are [H] and [1]."""
    hidden = np.maximum(observations @ weights.w1.T + weights.b1, 0.0)
    logits = hidden @ weights.w2 + weights.b2
    return hidden, 0.5 + 0.5 * np.tanh(0.5 * logits)  # the sigmoid, without an exponential that overflows


def backward(weights: Weights, episode: Episode, advantages: Array) -> Weights:
    """Return the gradient of `sum_t A_t log P(a_t | x_t)` for fixed advantages A [T]."""
    hidden, probabilities = forward(weights, episode.observations)
    d_logits = advantages * (episode.actions - probabilities)  # [T]
    d_hidden = np.outer(d_logits, weights.w2) * (hidden > 0)  # [T, H]; a ReLU at 0 has no slope
    return Weights(
        d_hidden.T @ episode.observations, d_hidden.sum(0), hidden.T @ d_logits, d_logits.sum(keepdims=True)
    )


def returns_of(rewards: Array, gamma: float, window: int | None = None) -> Array:
    """Return `G_t = sum_u gamma^(u - t) r_u`, [T], over u from t to the end, or to t + window - 1."""
    returns = np.array(rewards, dtype=np.float64)
    for t in range(len(returns) - 2, -1, -1):
        returns[t] += gamma * returns[t + 1]
    if window is not None:
        returns[:-window] -= gamma**window * returns[window:]
    return returns


def advantages_of(rewards: Array, settings: NumpySettings) -> Array:
    """Return the advantages [T] of one episode from its rewards [T]."""
    returns = returns_of(rewards, settings.gamma, settings.window)
    if not settings.standardise:
        return returns
    return (returns - returns.mean()) / (returns.std() + 1e-8)


def ascend(weights: Weights, gradient: Weights, squares: Weights, settings: NumpySettings) -> None:
    """Ascend by RMSProp, in place: `v <- d v + (1 - d) g^2`, `w <- w + lr g / (sqrt(v) + eps)`."""
    for weight, slope, square in zip(weights, gradient, squares, strict=True):
        square *= settings.decay
        square += (1.0 - settings.decay) * slope**2
        weight += settings.learning_rate * slope / (np.sqrt(square) + settings.epsilon)


def play(env: Any, weights: Weights, generator: np.random.Generator) -> Episode:
    """Play one episode with sampled actions, until it terminates or is truncated.

    Raises:
        Stopped: The environment raised an error, or a reward or an observation cannot be used.
    """
    observations, actions, rewards, over = [_called(env, "reset")[0]], [], [], False
    while not over:
        _, probability = forward(weights, observations[-1])
        actions.append(int(generator.random() < probability[0]))
        observation, reward, terminated, truncated, _ = _called(env, "step", actions[-1])
        observations.append(observation)
        rewards.append(reward)
        over = terminated or truncated
    check_finite(env.spec.id, np.array(observations), np.array(rewards, float))
    return Episode(np.array(observations[:-1], dtype=np.float64), np.array(actions), np.array(rewards))


def _called(env: Any, method: str, *args: Any, **options: Any) -> Any:
    try:
        return getattr(env, method)(*args, **options)
    except BaseException as error:
        raise failed(env.spec.id, method, error) from error


def train_numpy(settings: NumpySettings) -> Iterator[tuple[Weights, list[Episode]]]:
    """Train without end; each update yields the new weights and the episodes that it used.

    The next update changes the weights in place, so copy those that you want to keep.

    Raises:
        Refused: The environment cannot be made, or lacks a vector of observations or two discrete actions.
    """
    first, actions, world = np.random.SeedSequence(settings.seed).spawn(3)
    env, generator = make(settings.env), np.random.default_rng(actions)
    _called(env, "reset", seed=int(world.generate_state(1)[0]))
    weights = initial_weights(env.observation_space.shape[0], settings.hidden, np.random.default_rng(first))
    squares = Weights(*map(np.zeros_like, weights))
    while True:
        episodes = [play(env, weights, generator) for _ in range(settings.episodes_per_update)]
        gradients = [backward(weights, e, advantages_of(e.rewards, settings)) for e in episodes]
        ascend(
            weights, Weights(*(np.mean(part, 0) for part in zip(*gradients, strict=True))), squares, settings
        )
        yield weights, episodes


def make(name: str) -> Any:
    """Make the environment, a `gymnasium.Env`.

    Raises:
        Refused: As `train_numpy`.
    """
    import gymnasium

    from tokenrl.control.registered import find

    spec = find(name)
    with refusing(spec.id):
        env = gymnasium.make(spec, disable_env_checker=True)
    seen, done = env.observation_space, env.action_space
    if len(seen.shape or ()) != 1 or done != gymnasium.spaces.Discrete(2):
        raise Refused(
            f"env {name!r} has observations {seen} and actions {done}; this agent reads a vector and chooses "
            "between two actions. Take CartPole-v1, or `tokenrl control` for other actions."
        )
    return env
