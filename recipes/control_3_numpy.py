"""REINFORCE on CartPole-v1 in NumPy alone, and DQN beside it, by episodes and by environment steps.

The agent is one page, `tokenrl/control/numpy_agent.py`: read it beside this. 100 ReLU units, a gradient
written by hand, RMSProp, five episodes an update. --dqn trains DQN of stable-baselines3 too. The curves are
rolling means of 100 training episodes, as they are played: with sampled actions, and by DQN with 4 % random
ones. At the end both play 100 fresh episodes with their best actions only. Each finished run is kept as a
file: Ctrl-C draws those, and --resume goes on from them.

Expect, with seeds 0 to 4 [95 % intervals of the mean]: REINFORCE reaches a mean of 475 with all of them,
after 1,961 to 2,860 episodes, which are 647,511 to 801,892 steps. Then it fluctuates a little: the last 100
of 3,000 episodes return 469 [456, 482], the best actions 496 [493, 499]. DQN uses every step many times and
needs fewer: after 150,000 steps its last 100 episodes return 428 [379, 471], those of REINFORCE after as many
293. Its best actions return 500 with four seeds and 276 with one; with the random ones, one seed exceeds 475.
In time it is the other way round: 3,000 episodes of REINFORCE take 13 seconds of one core, and these steps of
DQN 171. With the zoo's own settings, tuned for 50,000 steps, DQN fell to 69 [52, 86] by 100,000.
"""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import gymnasium
import numpy as np
import tyro
from matplotlib.figure import Figure

from tokenrl.control import NumpySettings, seed_of, train_numpy
from tokenrl.runs import write_json

COLOURS = {"REINFORCE": "#0072B2", "DQN": "#D55E00"}  # Okabe and Ito
GREY = "#8A8A8A"
SUGGESTED = 475.0  # CartPole-v1's own reward threshold, for the mean of 100 episodes
WIDTH = 100  # episodes in a rolling mean, and in the evaluation
# Network, batch and buffer are rl-baselines3-zoo's; its other settings are for 50,000 steps, and a longer run
# loses its policy again. These converge: a smaller rate that falls to 0, and slower target networks. They
# were chosen by a trial with seed 0.
DQN = {
    "batch_size": 64, "buffer_size": 100_000, "learning_starts": 1000, "gamma": 0.99, "train_freq": 4,
    "gradient_steps": 2, "target_update_interval": 500, "exploration_fraction": 0.1,
    "exploration_final_eps": 0.04, "policy_kwargs": {"net_arch": [256, 256]},
}  # fmt: skip
DQN_RATE = 5e-4
Act = Callable[[np.ndarray], np.ndarray]  # the best actions [N] for observations [N, 4]


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; one run of each agent for each."""
    episodes: int = 3000
    """Episodes of each run of REINFORCE."""
    dqn: bool = False
    """Train DQN (stable-baselines3) too."""
    dqn_steps: int = 150_000
    """Environment steps of each run of DQN."""
    output: Path = Path("numpy_cartpole.png")
    """Where the figure goes."""
    output_dir: Path = Path("runs/control_3_numpy")
    """Where each finished run goes, as a JSON file."""
    resume: bool = False
    """Take the runs of equal settings that the directory holds, and train only those that are missing."""

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("--seeds needs at least one value.")


class Run(NamedTuple):
    """What is kept of a run; each step has a reward of 1, so that returns are numbers of steps too."""

    returns: np.ndarray  # of each training episode
    greedy: np.ndarray  # of 100 fresh episodes afterwards, always with the best action
    seconds: float  # of CPU time


def progress(name: str, done: str, returns: list[float]) -> None:
    print(f"  {name}: {done}, mean {np.mean(returns[-WIDTH:]):.0f}", flush=True)


def reinforce(seed: int, episodes: int) -> tuple[list[float], Act]:
    """Train the NumPy agent; the best action is the one with the larger probability."""
    settings, returns = NumpySettings(seed=seed), []
    for weights, batch in islice(train_numpy(settings), -(-episodes // settings.episodes_per_update)):  # noqa: B007
        returns += [float(episode.rewards.sum()) for episode in batch]
        if len(returns) % 1000 == 0:
            progress(f"REINFORCE, seed {seed}", f"{len(returns):,} of {episodes:,} episodes", returns)

    def act(observations: np.ndarray) -> np.ndarray:
        hidden = np.maximum(observations @ weights.w1.T + weights.b1, 0)
        return (hidden @ weights.w2 + weights.b2 > 0).astype(int)

    return returns[:episodes], act


def dqn(seed: int, steps: int) -> tuple[list[float], Act]:
    """Train DQN; 4 % of its training actions stay random."""
    import torch
    from stable_baselines3 import DQN as Agent
    from stable_baselines3.common.monitor import Monitor

    torch.set_num_threads(1)  # networks so small gain nothing from more
    env = Monitor(gymnasium.make("CartPole-v1"))
    agent = Agent("MlpPolicy", env, lambda left: DQN_RATE * left, seed=seed, device="cpu", **DQN)

    def goes_on(*_: object) -> bool:
        if agent.num_timesteps % 10_000 == 0:
            done = f"{agent.num_timesteps:,} of {steps:,} steps"
            progress(f"DQN, seed {seed}", done, env.get_episode_rewards())
        return True

    agent.learn(steps, callback=goes_on)
    return env.get_episode_rewards(), lambda seen: agent.predict(seen, deterministic=True)[0]


def evaluate(act: Act, seed: int) -> np.ndarray:
    """Return the returns of 100 fresh episodes, which start alike for both agents."""
    envs = gymnasium.make_vec("CartPole-v1", WIDTH, vectorization_mode="sync")
    observations, _ = envs.reset(seed=seed_of(seed, 1, evaluation=True))
    returns, playing = np.zeros(WIDTH), np.ones(WIDTH, dtype=bool)
    while playing.any():
        observations, rewards, terminated, truncated, _ = envs.step(act(observations))
        returns += rewards * playing
        playing &= ~(terminated | truncated)
    envs.close()
    return returns


def run(args: Args, kind: str, seed: int) -> Run:
    """Train and evaluate one agent and write its file, or read that if it is there and may be used."""
    if kind == "DQN":
        asked = {**DQN, "learning_rate": DQN_RATE, "seed": seed, "steps": args.dqn_steps}
    else:
        asked = {**asdict(NumpySettings(seed=seed)), "episodes": args.episodes}
    path = args.output_dir / f"{kind}_seed_{seed}.json"
    if args.resume and path.exists() and (kept := json.loads(path.read_text()))["asked"] == asked:
        return Run(np.array(kept["returns"]), np.array(kept["greedy"]), kept["seconds"])
    start = time.process_time()
    returns, act = dqn(seed, args.dqn_steps) if kind == "DQN" else reinforce(seed, args.episodes)
    greedy, seconds = evaluate(act, seed), time.process_time() - start
    found = {"returns": returns, "greedy": greedy.tolist(), "seconds": seconds}
    write_json(path, {"asked": asked} | found)
    return Run(np.array(returns), greedy, seconds)


def rolling(returns: np.ndarray) -> np.ndarray:
    """Mean of the last 100 episodes, from the hundredth on (of fewer, if there are fewer)."""
    width = min(WIDTH, len(returns))
    return np.convolve(returns, np.ones(width) / width, mode="valid")


def curve(one: Run, axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Return episodes or environment steps, and the rolling mean at the end of each, [n] both."""
    mean = rolling(one.returns)
    episodes = np.arange(len(mean)) + len(one.returns) - len(mean) + 1
    return (episodes if axis == "episodes" else np.cumsum(one.returns)[episodes - 1]), mean


def together(
    curves: list[tuple[np.ndarray, np.ndarray]], points: int = 2000
) -> tuple[np.ndarray, np.ndarray]:
    """Return a grid [points] and each curve on it, interpolated, [seeds, points].

    The grid lies where all curves do: beyond, the mean would be of those seeds whose episodes were short.
    """
    first, last = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = np.geomspace(min(first, last), last, points)
    return grid, np.array([np.interp(grid, x, mean) for x, mean in curves])


def reached(one: Run) -> tuple[float, float]:
    """Return episodes and steps until a rolling mean of 475, or infinities if there is none."""
    mean = rolling(one.returns)
    if mean.max() < SUGGESTED:
        return np.inf, np.inf
    episodes = int(np.argmax(mean >= SUGGESTED)) + len(one.returns) - len(mean) + 1
    return episodes, float(one.returns[:episodes].sum())


def interval(x: np.ndarray) -> np.ndarray:
    """Return mean, low and high of the mean over the first axis, the seeds; 95 %, 2000 resamples."""
    n = len(x)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 2000) / n
    return np.concatenate([[x.mean(0)], np.quantile(weights @ x, (0.025, 0.975), axis=0)])


def say(numbers: list[float]) -> str:
    return "{:.0f} [{:.0f}, {:.0f}]".format(*interval(np.array(numbers)))


def count(number: float) -> str:
    return f"{number:,.0f}" if np.isfinite(number) else "never"


def tell(name: str, one: Run) -> None:
    """Print one run."""
    episodes, steps = map(count, reached(one))
    when = "475 never" if episodes == "never" else f"475 after {episodes} episodes, {steps} steps"
    mean, size = rolling(one.returns), f"{len(one.returns):,} episodes, {one.returns.sum():,.0f} steps"
    print(f"{name}: {when}; best {mean.max():.1f}, last {mean[-1]:.1f}, greedy {one.greedy.mean():.1f}; "
          f"{size}, {one.seconds:.0f} s", flush=True)  # fmt: skip


def summary(kind: str, runs: list[Run]) -> str:
    """Print what the runs of one agent come to, and return a line for the title."""
    when = np.array([reached(one) for one in runs])  # [seeds, 2]
    episodes, steps = map(count, np.median(when, axis=0))  # never, if fewer than half of the seeds get there
    number = f"{np.isfinite(when[:, 0]).sum()} of {len(runs)} seeds"
    means = [rolling(one.returns) for one in runs]
    best, last = [mean.max() for mean in means], [mean[-1] for mean in means]
    greedy = [one.greedy.mean() for one in runs]
    print(f"{kind}, {len(runs)} seeds: a mean of 475 in {number}, median {episodes} episodes, {steps} steps")
    print(f"  highest mean of 100 training episodes {say(best)}")
    print(f"  last 100 training episodes {say(last)}")
    print(f"  100 fresh episodes with the best actions {say(greedy)}")
    print(f"  CPU seconds {say([one.seconds for one in runs])}")
    at = "" if steps == "never" else f" (median: after {steps} steps)"
    ends = f"{np.mean(last):.0f}, with the best actions {np.mean(greedy):.0f}"
    return f"{kind}: a mean of 475 in {number}{at}; highest {np.mean(best):.0f}; at the end {ends}"


def draw(runs: dict[str, list[Run]], title: str) -> Figure:
    figure = Figure(figsize=(12, 5.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, label in ((left, "episodes"), (right, "environment steps")):
        for kind, of_kind in runs.items():
            curves = [curve(one, label) for one in of_kind]
            for x, mean in curves:
                axes.plot(x, mean, color=COLOURS[kind], linewidth=0.7, alpha=0.4)
            x, means = together(curves)
            middle, low, high = interval(means)
            axes.fill_between(x, low, high, color=COLOURS[kind], alpha=0.2, linewidth=0)
            axes.plot(x, middle, color=COLOURS[kind], linewidth=2.4, label=f"{kind}, {len(of_kind)} seeds")
        axes.axhline(500, color=GREY, linewidth=1, linestyle="--")
        axes.set_xlabel(label)
        axes.set_ylim(0, 540)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EAEAEA", linewidth=0.8)
    left.set_ylabel("training return, mean of the last 100 episodes")
    left.set_xlim(left=0)
    right.set_xscale("log")
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:,.0f}")
    left.annotate("500, the most there is", (30, 505), color=GREY, fontsize=9)
    left.legend(frameon=False, loc="lower right")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    note = "bands: 95 % of the mean over seeds (bootstrap), as far as every seed goes; thin lines: each seed"
    figure.supxlabel(note, fontsize=9)
    return figure


def stop(number: int, _: object) -> None:
    """End what is going on, for Ctrl-C and SIGTERM; the exit code is the shell's, 130 or 143."""
    raise SystemExit(128 + number)


def train(args: Args, runs: dict[str, list[Run]]) -> int:
    """Add run after run, seed by seed so that both agents get on alike; return the exit code."""
    total = len(runs) * len(args.seeds)
    try:
        for seed in args.seeds:
            for kind in runs:
                runs[kind].append(run(args, kind, seed))
                tell(f"{kind}, seed {seed}", runs[kind][-1])
    except SystemExit as end:
        done = sum(map(len, runs.values()))
        print(f"stopped: {done} of {total} runs are finished, in {args.output_dir}; --resume goes on")
        return int(end.code or 0)
    return 0


def main(args: Args) -> None:
    if args.dqn and find_spec("stable_baselines3") is None:
        raise SystemExit("--dqn needs stable-baselines3: pip install stable-baselines3, or leave --dqn out.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    runs: dict[str, list[Run]] = {"REINFORCE": [], **({"DQN": []} if args.dqn else {})}
    code = train(args, runs)
    finished = {kind: of_kind for kind, of_kind in runs.items() if of_kind}
    if finished:
        title = "\n".join(summary(kind, of_kind) for kind, of_kind in finished.items())
        draw(finished, title).savefig(args.output)
        print(f"figure: {args.output}")
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main(tyro.cli(Args))
