"""REINFORCE on CartPole-v1 in NumPy alone: the agent, and beside it the agent with its settings changed.

    python recipes/control/3_numpy.py --vary gamma=0.8 gamma=0.95 window=5 standardise=False

The agent comes first, as one page: 100 ReLU units, a gradient written by hand, RMSProp, five episodes an
update. `P(1 | x) = sigmoid(w2 . relu(W1 x + b1) + b2)`; the score in the logit z is `d log P(a) / dz =
a - P(1)`, and the rest is the chain rule. The score of each action is multiplied by its advantage: the
discounted return from that action on, standardised over the episode's steps. As an `Estimator` this is

    Estimator(baseline="episode_mean", scale="episode_std", scale_ddof=0, scale_eps=1e-8,
              returns="reward_to_go", gamma=0.99)

which is "biased": mean and deviation of the episode depend on the actions that they are used for, and
discounting from each action on is the gradient of no objective. It works all the same where episodes end in
failure: early actions then get positive advantages and late ones negative. An episode that the time limit
cuts counts as if it had ended there.

Look for: a mean of 475 over 100 episodes with every seed within 3,000 episodes. What looks ahead by 50 steps
or fewer stays behind. The numbers are in recipes/pages/tutorials/learn_reinforce.md, lesson 4.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import tyro
from curves import GREY, draw_rolling, mean_with_interval, rolling, save
from matplotlib.figure import Figure

from tokenrl.control import seed_of


@dataclass(frozen=True)
class Settings:
    """Settings of the agent; the defaults learn CartPole-v1."""

    hidden: int = 100
    """Number of hidden units (ReLU)."""
    gamma: float = 0.99
    """Discount per step; with 0.99 a reward 100 steps later counts 0.99^100 = 0.37."""
    window: int | None = None
    """Credit each reward only to this many actions before it (the blame window); None: to all of them."""
    standardise: bool = True
    """Subtract the mean of the episode's returns to go and divide by their standard deviation."""
    episodes_per_update: int = 5
    learning_rate: float = 1e-3
    decay: float = 0.99
    """Decay per update of RMSProp's running mean of squared gradients."""
    epsilon: float = 1e-5
    seed: int = 0


class Weights(NamedTuple):
    """Weights of H hidden units over observations of length D; a gradient has the same four parts."""

    w1: np.ndarray  # [H, D]
    b1: np.ndarray  # [H]
    w2: np.ndarray  # [H]
    b2: np.ndarray  # [1]


class Episode(NamedTuple):
    """Observations, actions and rewards of T steps."""

    observations: np.ndarray  # [T, D]
    actions: np.ndarray  # [T], 0 or 1
    rewards: np.ndarray  # [T]


def initial_weights(observations: int, hidden: int, generator: np.random.Generator) -> Weights:
    """Draw normal weights whose variance is 1 over the number of inputs; biases start at 0."""
    w1 = generator.standard_normal((hidden, observations)) / np.sqrt(observations)
    w2 = generator.standard_normal(hidden) / np.sqrt(hidden)
    return Weights(w1, np.zeros(hidden), w2, np.zeros(1))


def forward(weights: Weights, observations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hidden layer [T, H] and P(1) [T]; for one observation [D], they are [H] and [1]."""
    hidden = np.maximum(observations @ weights.w1.T + weights.b1, 0.0)
    logits = hidden @ weights.w2 + weights.b2
    # The sigmoid, without an exponential that overflows.
    return hidden, 0.5 + 0.5 * np.tanh(0.5 * logits)


def backward(weights: Weights, episode: Episode, advantages: np.ndarray) -> Weights:
    """Return the gradient of `sum_t A_t log P(a_t | x_t)` for fixed advantages A [T]."""
    hidden, probabilities = forward(weights, episode.observations)
    d_logits = advantages * (episode.actions - probabilities)  # [T]
    d_hidden = np.outer(d_logits, weights.w2) * (hidden > 0)  # [T, H]; a ReLU at 0 has no slope
    return Weights(
        d_hidden.T @ episode.observations,
        d_hidden.sum(0),
        hidden.T @ d_logits,
        d_logits.sum(keepdims=True),
    )


def advantages_of(rewards: np.ndarray, settings: Settings) -> np.ndarray:
    """Return `G_t = sum_u gamma^(u - t) r_u`, [T], over u from t to the end or the window's, standardised."""
    returns = np.array(rewards, dtype=np.float64)
    for t in range(len(returns) - 2, -1, -1):
        returns[t] += settings.gamma * returns[t + 1]
    if settings.window is not None:
        returns[: -settings.window] -= settings.gamma**settings.window * returns[settings.window :]
    if settings.standardise:
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
    return returns


def ascend(weights: Weights, gradient: Weights, squares: Weights, settings: Settings) -> None:
    """Ascend by RMSProp, in place: `v <- d v + (1 - d) g^2`, `w <- w + lr g / (sqrt(v) + eps)`."""
    for weight, slope, square in zip(weights, gradient, squares, strict=True):
        square *= settings.decay
        square += (1.0 - settings.decay) * slope**2
        weight += settings.learning_rate * slope / (np.sqrt(square) + settings.epsilon)


def play(env: gymnasium.Env, weights: Weights, generator: np.random.Generator) -> Episode:
    """Play one episode with sampled actions, until it terminates or is truncated."""
    observations = [env.reset()[0]]
    actions = []
    rewards = []
    ended = False
    while not ended:
        _, probability = forward(weights, observations[-1])
        actions.append(int(generator.random() < probability[0]))
        observation, reward, terminated, truncated, _ = env.step(actions[-1])
        observations.append(observation)
        rewards.append(reward)
        ended = terminated or truncated
    inputs = np.array(observations[:-1], dtype=np.float64)
    return Episode(inputs, np.array(actions), np.array(rewards))


def train(settings: Settings) -> Iterator[tuple[Weights, list[Episode]]]:
    """Train without end; each update yields the weights, which the next changes, and its episodes."""
    weight_seed, action_seed, start_seed = np.random.SeedSequence(settings.seed).spawn(3)
    env = gymnasium.make("CartPole-v1")
    env.reset(seed=int(start_seed.generate_state(1)[0]))
    generator = np.random.default_rng(action_seed)
    weights = initial_weights(4, settings.hidden, np.random.default_rng(weight_seed))
    squares = Weights(*map(np.zeros_like, weights))
    while True:
        episodes = [play(env, weights, generator) for _ in range(settings.episodes_per_update)]
        gradients = [backward(weights, e, advantages_of(e.rewards, settings)) for e in episodes]
        mean = Weights(*(np.mean(part, 0) for part in zip(*gradients, strict=True)))
        ascend(weights, mean, squares, settings)
        yield weights, episodes


# What follows runs the agent over seeds and draws it.

COLOURS = (
    "black",
    "#D55E00",
    "#CC79A7",
    "#009E73",
    "#0072B2",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito
THRESHOLD = 475.0  # CartPole-v1's own reward threshold, for the mean of 100 episodes
WIDTH = 100  # episodes in a rolling mean and in the evaluation
TAIL = 500  # episodes at the end by which settings are compared


def reinforce(settings: Settings, episodes: int) -> tuple[list[float], float]:
    """Train; returns the return of each episode, and the mean of fresh ones, always with the best action."""
    returns: list[float] = []
    for weights, batch in train(settings):
        returns += [float(episode.rewards.sum()) for episode in batch]
        if len(returns) >= episodes:
            return returns[:episodes], evaluate(weights, settings.seed)


def evaluate(weights: Weights, seed: int) -> float:
    """Return the mean return of 100 fresh episodes, which start alike for all agents."""
    envs = gymnasium.make_vec("CartPole-v1", WIDTH, vectorization_mode="sync")
    observations, _ = envs.reset(seed=seed_of(seed, 1, evaluation=True))
    returns = np.zeros(WIDTH)
    playing = np.ones(WIDTH, dtype=bool)
    while playing.any():
        actions = (forward(weights, observations)[1] > 0.5).astype(int)
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        returns += rewards * playing
        playing &= ~(terminated | truncated)
    return returns.mean()


def report(kind: str, returns: np.ndarray, greedy: list[float], usual: np.ndarray) -> str:
    """Print the results [seeds, episodes] of one kind, beside the usual agent's; returns a label for the figure."""
    above = rolling(returns, WIDTH) >= THRESHOLD
    first = above.argmax(1) + WIDTH  # a step has a reward of 1: returns are numbers of steps too
    steps = np.cumsum(returns, 1)[range(len(returns)), first - 1]
    episodes, steps = (np.median(np.where(above.any(1), x, np.inf)) for x in (first, steps))
    solved = f"475 in {above.any(1).sum()} of {len(returns)} seeds"
    median = f"{episodes:,.0f} episodes, {steps:,.0f} steps" if np.isfinite(steps) else "never"
    print(f"{kind}, {len(returns)} seeds: a mean of {solved}, median {median}")
    for label, count in ((f"the last {TAIL}", TAIL), ("the last 100", 100), ("all", 0)):
        means, others = (x[:, -count:].mean(1) for x in (returns, usual))
        gain = mean_with_interval(means - others, "+.0f")
        against = "" if returns is usual else f"; against the usual agent {gain}"
        print(f"  {label} training episodes {mean_with_interval(means, '.0f')}{against}")
    print(f"  100 fresh episodes with the best actions {mean_with_interval(greedy, '.0f')}")
    return f"{kind}: {solved}, median {median}"


def varied(text: str) -> Settings:
    """Return the usual settings with the changes of a text such as gamma=1,standardise=False."""
    changes = dict(change.split("=") for change in text.split(","))
    return replace(Settings(), **{name: ast.literal_eval(value) for name, value in changes.items()})


def main(
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    episodes: int = 3000,
    vary: tuple[str, ...] = (),
    output: Path = Path("numpy_cartpole.png"),
) -> None:
    """Train the NumPy agent over seeds; beside itself with other settings where `vary` names some.

    Args:
        seeds: Seeds; one run of each kind for each.
        episodes: Episodes of each run of REINFORCE, 100 or more.
        vary: Settings to train beside the usual ones, as gamma=0.8, window=5 or gamma=1,standardise=False.
        output: Where the figure goes.
    """
    figure = Figure(figsize=(8, 5), dpi=100, layout="constrained")
    axes = figure.subplots()
    for kind, colour in zip(("REINFORCE", *vary), cycle(COLOURS), strict=False):
        settings = Settings() if kind == "REINFORCE" else varied(kind)
        runs = [reinforce(replace(settings, seed=seed), episodes) for seed in seeds]
        returns, greedy = (np.array(x) for x in zip(*runs, strict=True))
        usual = returns if kind == "REINFORCE" else usual
        draw_rolling(axes, returns, WIDTH, colour, report(kind, returns, greedy, usual))
    axes.axhline(500, color=GREY, linewidth=1, linestyle="--")
    axes.set(xlim=(0, None), ylim=(0, 540), xlabel="episodes; bands: 95 % of the mean over seeds")
    axes.set_ylabel("training return, mean of the last 100 episodes")
    figure.legend(loc="outside upper left", frameon=False)
    save(figure, output)


if __name__ == "__main__":
    tyro.cli(main)
