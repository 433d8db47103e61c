"""PyTorch agents on gymnasium's classic environments, over seeds, evaluated on fresh episodes.

    python recipes/control_5_agents.py --env CartPole-v1 --seeds 10

There are two agents. `classic` is the one of textbooks: one hidden layer of 16 ReLU units, Adam 0.01, reward
to go, whitened over the update (mean 0, standard deviation 1), one whole episode in each of 16 environments.
`tuned` has settings for each environment; the comments below say what each choice is for.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from tokenrl import ControlResult, Estimator, train_agent

# Whitening subtracts the mean over all steps of the update: a baseline, and with gamma 0.99 a biased one.
CLASSIC: dict[str, Any] = {
    "estimator": Estimator(baseline="none", returns="reward_to_go", scale="token_whiten", gamma=0.99),
    "hidden": (16,),
    "activation": "relu",
    "learning_rate": 0.01,
    "num_envs": 16,
}

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


@dataclass
class Arguments:
    """Train one kind of agent on one environment, over seeds."""

    env: Literal["CartPole-v1", "Acrobot-v1", "LunarLander-v3", "LunarLanderContinuous-v3", "Pendulum-v1"] = (
        "CartPole-v1"
    )
    """Environment."""
    agent: Literal["tuned", "classic"] = "tuned"
    """Settings."""
    seeds: int = 5
    """Seeds 0, 1, ... of weights, environments and actions."""
    max_steps: int | None = None
    """Updates. Default: as tuned; classic 200."""
    eval_episodes: int = 100
    """Fresh episodes of each evaluation."""
    output_dir: Path = Path("runs")
    """Where the run directories go."""
    video: bool = False
    """Film an episode of each trained policy."""


def row(seed: int, result: ControlResult) -> str:
    """Return the line of one seed."""
    before, after = result.eval_before, result.eval_after
    verdict = {True: "solved", False: "not solved", None: ""}[result.solved]
    return (
        f"{seed:4} {before['reward']:9.1f} {after['reward']:9.1f} ± {after['reward_stderr']:<5.1f}"
        f" {after['reward_greedy']:9.1f} {result.env_steps:11,} {result.train_cpu_seconds:8.1f}  {verdict}"
    )


def main(args: Arguments) -> None:
    """Train seed by seed, and print a summary."""
    settings = TUNED[args.env] if args.agent == "tuned" else CLASSIC | {"max_steps": 200}
    if args.agent == "classic" and args.env.endswith(("Continuous-v3", "Pendulum-v1")):
        print("The classic agent chooses among actions by softmax; here it gets the Gaussian head instead.")
    if args.max_steps is not None:
        settings = settings | {"max_steps": args.max_steps}
    print(f"{args.env}, {args.agent}; mean return of {args.eval_episodes} fresh episodes, ± standard error")
    print("seed    before     after           greedy   env steps  CPU s")
    results = []
    for seed in range(args.seeds):
        folder = args.output_dir / f"{args.env}-{args.agent}-seed{seed}"
        result = train_agent(
            **settings,
            env=args.env,
            seed=seed,
            output_dir=str(folder),
            eval_episodes=args.eval_episodes,
            eval_every=0,  # before and after: a hundred fresh episodes cost as much as several updates
            video=args.video,
            overwrite=True,
            quiet=True,
        )
        print(row(seed, result), flush=True)
        if result.exit_code:  # a signal ended this run: no further one
            raise SystemExit(result.exit_code)
        results.append(result)
    after = [result.eval_after["reward"] for result in results]
    spread = f", lowest {min(after):.1f}, highest {max(after):.1f}"
    print(f"mean over {len(after)} seeds {statistics.fmean(after):.1f}{spread}")
    if results[0].solved is not None:
        print(f"solved: {sum(bool(result.solved) for result in results)} of {len(results)} seeds")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
