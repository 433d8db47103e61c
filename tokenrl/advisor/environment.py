"""Recommends settings for an environment, from its spaces and from returns of the untrained policy."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, replace

import torch

from tokenrl.advisor.advice import Advice, AdviseArguments, command_line
from tokenrl.control.arguments import ControlArguments, agents
from tokenrl.control.environments import Environments, Spec, describe
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import collect_episodes
from tokenrl.core.refusals import LONGEST_WITHOUT_BASELINE
from tokenrl.errors import Refused, Stopped
from tokenrl.files import flat
from tokenrl.runs.findings import observe
from tokenrl.runs.rules import Means, judge

APPROACHES = {
    "episodes": "the mean of the other episodes at the same step needs no critic",
    "critic": "a critic on pieces of episodes (ppo): whole episodes are long, or slow to step",
    "continuous": "a critic on pieces of episodes (ppo): the actions are continuous",
}
"""Where the advice starts (see control/agents.yaml), and why with this baseline."""
WHOLE = {
    "estimator.returns": "rewards that came before an action are left out of its advantage",
    "estimator.scale": "no division is exact; Adam's steps have one size, whatever the returns",
    "estimator.ratio": "on-policy: every rollout is used for one update only",
    "num_envs": "as many whole episodes per update",
}
PIECES = {
    "estimator.returns": "GAE: lam trades the critic's bias for less noise",
    "estimator.gamma": "credit reaches about 1 / (1 - gamma) steps; nearer 1 for later rewards",
    "estimator.scale": "PPO divides by the spread of the step: one rate suits any returns",
    "estimator.ratio": "PPO's clip lets a rollout be used more than once",
    "num_envs": "copies that are stepped together",
    "num_steps": "pieces of episodes: the critic estimates the rest, so that updates need not wait",
    "num_iterations": "passes over each rollout; staler data gets clipped",
}
ALWAYS = {
    "learning_rate": "Adam; halve it if the return rises and then falls",
    "max_steps": "updates; --stop-when-solved may end sooner where there is a threshold",
}
"""The reasons of settings: where episodes stay whole, where they do not, and in both cases."""
ENTROPY = 0.01
"""Entropy bonus, in standard deviations of what the advantages are made of (1 where they are whitened)."""
ENDLESS_GAMMA = 0.95
"""Discount of continuous control in which only the time limit ends an episode, such as Pendulum-v1."""
SLOW_STEPS = 10_000
"""Steps per update that are cheap even where environments are stepped one by one."""
MEASURED_STEPS = 20_000
"""Largest number of steps of a measurement, which still takes at least ten episodes."""


def advise_environment(args: AdviseArguments) -> Advice:
    """Measure an environment and recommend settings for `tokenrl control`.

    Raises:
        Refused: the environment cannot be made, or fails in the measurement.
    """
    spec = describe(args.env, args.max_episode_steps)
    approach = choose_approach(spec)
    control = ControlArguments(
        env=args.env,
        seed=args.seed,
        max_episode_steps=args.max_episode_steps,
        **agents()["advised"][approach],
    )
    returns = measure_returns(spec, args, control.hidden)
    control = fitted(replace(control, head=spec.head), spec, returns)
    observed = replace(
        observe([], control),
        groups=f"{returns['episodes']} episodes of nearly random actions",
        step=Means(reward=returns["mean"], equal=1 - returns["unusual"]),
    )
    # An entropy bonus changes the objective, not the bias.
    bias = replace(control.estimator, entropy_coef=0.0).bias_status.replace("_", " ")
    reasons = {
        "estimator.baseline": f"{APPROACHES[approach]}; gradient {bias}, an entropy bonus aside"
    }
    reasons |= (WHOLE if control.num_steps is None else PIECES) | ALWAYS
    if spec.discrete:
        reasons["estimator.entropy_coef"] = (
            f"{ENTROPY:g} of the spread of advantages, so that the policy explores at first; falls to 0"
        )
    if "values" in control.estimator.needs:
        reasons["reward_scale"] = "about 1 / sd of returns: a critic learns targets of size 1"
    line = f"Run it: {command_line('control', control)}"
    measured = {
        name: f"{value:.4g}" if isinstance(value, float) else str(value)
        for name, value in (asdict(spec) | returns).items()
    }
    settings = flat(vars(control))
    table = {name: (settings[name], reason) for name, reason in reasons.items()}
    return Advice(spec.env, line, measured, judge(observed), table)


def choose_approach(spec: Spec) -> str:
    """Choose a key of `APPROACHES`: whole episodes without a critic, or pieces of episodes with one.

    Beyond 500 steps pieces learn faster also where steps are cheap: on CartPole with 1000 steps, in the same
    processor time, the mean return of all evaluations is 904 with pieces and 837 with whole episodes.
    """
    cheap = spec.fast or spec.horizon * ControlArguments.num_envs <= SLOW_STEPS
    if not spec.discrete:
        return "continuous"
    return "episodes" if spec.horizon <= LONGEST_WITHOUT_BASELINE and cheap else "critic"


def measure_returns(spec: Spec, args: AdviseArguments, hidden: tuple[int, ...]) -> dict[str, float]:
    """Play episodes with a policy before training, whose actions are nearly random, and summarise them.

    Returns:
        The number of `episodes`, the `mean` and `sd` (ddof 1) of their returns, the share with an `unusual`
        return (not the most frequent return), and the share that the time limit `truncated`.
    """
    episodes = min(args.episodes, max(10, MEASURED_STEPS // spec.horizon))
    generator = torch.Generator().manual_seed(args.seed)
    shape = Shape(
        spec.observation_size,
        spec.head,
        spec.actions or spec.action_size,
        hidden,
        action_masks=spec.masked and spec.discrete,
    )
    policy = Policy(shape, generator)
    try:
        with closing(Environments(args.env, episodes, args.max_episode_steps)) as copies:
            rollout = collect_episodes(copies, policy, generator, seed=args.seed)
    except Stopped as error:  # nothing has been trained
        raise Refused(str(error)) from error
    returns = rollout.returns
    frequent = returns.mode().values
    return {
        "episodes": len(returns),
        "mean": returns.mean().item(),
        "sd": returns.std().item(),
        "unusual": (returns != frequent).double().mean().item(),
        "truncated": rollout.truncated.double().mean().item(),
    }


def fitted(control: ControlArguments, spec: Spec, returns: dict[str, float]) -> ControlArguments:
    """Set what follows from the returns: reward scale, discount, entropy bonus."""
    estimator = control.estimator
    spread = returns["sd"] or max(1.0, abs(returns["mean"]))
    if "values" in estimator.needs:
        control = replace(control, reward_scale=float(f"{1 / spread:.1g}"))
        spread = 1.0  # returns are scaled to it
        if returns["truncated"] == 1 and not spec.discrete:
            estimator = replace(estimator, gamma=ENDLESS_GAMMA)
    if spec.discrete:
        estimator = replace(estimator, entropy_coef=float(f"{ENTROPY * spread:.1g}"))
        control = replace(control, entropy_schedule="linear")
    return replace(control, estimator=estimator)
