"""REINFORCE on CartPole-v1 in NumPy alone: the agent, beside DQN, and with its settings changed.

    python recipes/control/3_numpy.py --dqn                              # beside DQN of stable-baselines3
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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import tyro
from curves import GREY, draw_band, mean_with_interval, rolling, save
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
# Network, batch and buffer are rl-baselines3-zoo's. Its other settings are for 50,000 steps. These converge in
# longer runs too: a smaller rate that falls to 0, and slower target networks, chosen by a trial with seed 0.
DQN = {
    "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000, "gamma": 0.99, "train_freq": 4,
    "gradient_steps": 2, "target_update_interval": 500, "exploration_fraction": 0.1,
    "exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]},
}  # fmt: skip


class Run(NamedTuple):
    """The results of a run; each step has a reward of 1, so that returns are numbers of steps too."""

    returns: np.ndarray  # of each training episode
    greedy: np.ndarray  # of 100 fresh episodes afterwards, always with the best action
    seconds: float  # of CPU time

    def means(self) -> np.ndarray:
        """Return the mean of the last 100 episodes, from the hundredth on."""
        return rolling(self.returns[None], WIDTH)[0]

    def solved(self) -> tuple[float, float]:
        """Return episodes and steps until a mean of 475, or infinities if there is none."""
        above = self.means() >= THRESHOLD
        episodes = int(above.argmax()) + WIDTH
        steps = float(self.returns[:episodes].sum())
        return (episodes, steps) if above.any() else (np.inf, np.inf)


def reinforce(settings: Settings, episodes: int) -> Run:
    """Train the NumPy agent; the best action is the one with the larger probability."""
    start = time.process_time()
    returns: list[float] = []
    for weights, batch in train(settings):  # noqa: B007  the last weights are evaluated
        returns += [float(episode.rewards.sum()) for episode in batch]
        if len(returns) >= episodes:
            break
    greedy = evaluate(lambda x: (forward(weights, x)[1] > 0.5).astype(int), settings.seed)
    return Run(np.array(returns[:episodes]), greedy, time.process_time() - start)


def train_dqn(seed: int, steps: int) -> Run:
    """Train DQN; 4 % of its training actions stay random."""
    import torch
    from stable_baselines3 import DQN as Agent
    from stable_baselines3.common.monitor import Monitor

    torch.set_num_threads(1)  # networks so small gain nothing from more
    start = time.process_time()
    env = Monitor(gymnasium.make("CartPole-v1"))
    agent = Agent("MlpPolicy", env, lambda share: 5e-4 * share, seed=seed, device="cpu", **DQN)
    agent.learn(steps)
    greedy = evaluate(lambda x: agent.predict(x, deterministic=True)[0], seed)
    return Run(np.array(env.get_episode_rewards()), greedy, time.process_time() - start)


def evaluate(act: Callable[[np.ndarray], np.ndarray], seed: int) -> np.ndarray:
    """Return the returns of 100 fresh episodes, which start alike for both agents."""
    envs = gymnasium.make_vec("CartPole-v1", WIDTH, vectorization_mode="sync")
    observations, _ = envs.reset(seed=seed_of(seed, 1, evaluation=True))
    returns = np.zeros(WIDTH)
    playing = np.ones(WIDTH, dtype=bool)
    while playing.any():
        observations, rewards, terminated, truncated, _ = envs.step(act(observations))
        returns += rewards * playing
        playing &= ~(terminated | truncated)
    return returns


def report(kind: str, runs: list[Run], usual: list[Run]) -> str:
    """Print the results of one kind, beside the usual agent's with equal seeds; returns a label for the figure."""
    episodes, steps = np.array([run.solved() for run in runs]).T
    solved = f"475 in {np.isfinite(episodes).sum()} of {len(runs)} seeds"
    median = "never"
    if np.isfinite(np.median(steps)):
        median = f"{np.median(episodes):,.0f} episodes, {np.median(steps):,.0f} steps"
    print(f"{kind}, {len(runs)} seeds: a mean of {solved}, median {median}")
    for label, count in ((f"the last {TAIL}", TAIL), ("the last 100", 100), ("all", 0)):
        means = np.array([run.returns[-count:].mean() for run in runs])
        gains = means - [run.returns[-count:].mean() for run in usual]
        gain = mean_with_interval(gains, "+.0f")
        against = "" if runs is usual else f"; against the usual agent {gain}"
        print(f"  {label} training episodes {mean_with_interval(means, '.0f')}{against}")
    greedy = [run.greedy.mean() for run in runs]
    print(f"  100 fresh episodes with the best actions {mean_with_interval(greedy, '.0f')}")
    print(f"  CPU seconds {mean_with_interval([run.seconds for run in runs], '.0f')}")
    return f"{kind}: {solved}, median {median}"


def draw(runs: dict[str, list[Run]], labels: list[str]) -> Figure:
    """Draw each kind by episodes, and by environment steps as far as every seed goes."""
    figure = Figure(figsize=(12, 5.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for seeds, label, colour in zip(runs.values(), labels, cycle(COLOURS), strict=False):
        means = [run.means() for run in seeds]
        episodes = [np.arange(len(mean)) + WIDTH for mean in means]
        steps = [np.cumsum(run.returns)[WIDTH - 1 :] for run in seeds]
        for axes, x in ((left, episodes), (right, steps)):
            for curve in zip(x, means, strict=True):
                axes.plot(*curve, color=colour, linewidth=0.7, alpha=0.4)
            grid = np.geomspace(max(part[0] for part in x), min(part[-1] for part in x), 2000)
            curves = [np.interp(grid, *curve) for curve in zip(x, means, strict=True)]
            draw_band(axes, grid, np.array(curves), colour, label)
    for axes, label in ((left, "episodes"), (right, "environment steps")):
        axes.axhline(500, color=GREY, linewidth=1, linestyle="--")
        axes.set(xlabel=label, ylim=(0, 540))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    left.set(xlim=(0, None), ylabel="training return, mean of the last 100 episodes")
    right.set_xscale("log")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", frameon=False)
    figure.supxlabel("bands: 95 % of the mean over seeds; thin lines: each seed", fontsize=9)
    return figure


def varied(text: str) -> Settings:
    """Return the usual settings with the changes of a text such as gamma=1,standardise=False."""
    changes = dict(change.split("=") for change in text.split(","))
    return replace(Settings(), **{name: ast.literal_eval(value) for name, value in changes.items()})


def main(
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    episodes: int = 3000,
    vary: tuple[str, ...] = (),
    dqn: bool = False,
    dqn_steps: int = 150_000,
    output: Path = Path("numpy_cartpole.png"),
) -> None:
    """Train the NumPy agent over seeds; beside DQN, or beside itself with other settings.

    Args:
        seeds: Seeds; one run of each kind for each.
        episodes: Episodes of each run of REINFORCE, 100 or more.
        vary: Settings to train beside the usual ones, as gamma=0.8, window=5 or gamma=1,standardise=False.
        dqn: Train DQN (stable-baselines3) too.
        dqn_steps: Environment steps of each run of DQN.
        output: Where the figure goes.
    """
    runs: dict[str, list[Run]] = {}
    labels = []
    for kind in ("REINFORCE", *vary, *(["DQN"] if dqn else [])):
        if kind == "DQN":
            runs[kind] = [train_dqn(seed, dqn_steps) for seed in seeds]
        else:
            settings = Settings() if kind == "REINFORCE" else varied(kind)
            runs[kind] = [reinforce(replace(settings, seed=seed), episodes) for seed in seeds]
        labels.append(report(kind, runs[kind], runs["REINFORCE"]))
    save(draw(runs, labels), output)


if __name__ == "__main__":
    tyro.cli(main)
