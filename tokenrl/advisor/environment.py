"""Recommends settings for an environment, from its spaces and from returns of the untrained policy."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from tokenrl.advisor.advice import Advice, Setting, bias_in_words, judge_horizon, one_figure
from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Environments, Spec, describe
from tokenrl.control.policies import Policy, Shape, check_head
from tokenrl.control.rollouts import collect_episodes
from tokenrl.core.baselines import LONGEST_WITHOUT_BASELINE
from tokenrl.core.choices import AXES, choice_of
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.settings import check_choice


class Way(NamedTuple):
    """A way to train: a preset, the axes that differ from it, the other settings, and why this baseline."""

    preset: str
    axes: dict[str, Any]
    arguments: dict[str, Any]
    why: str


WAYS = {
    "episodes": Way(
        "reinforce_timestep_mean",
        {},
        {"max_steps": 100, "num_envs": 64, "hidden": (64,), "learning_rate": 2e-2},
        "the mean of the other episodes at the same step needs no critic",
    ),
    "critic_episodes": Way(
        "a2c",
        {},
        {"max_steps": 100, "num_envs": 64, "hidden": (64,), "learning_rate": 2e-2,
         "learning_rate_schedule": "linear"},
        "a critic, as you asked, on whole episodes (a2c): no rest is cut off that it would have to stand "
        "for, "
        "so that its errors are no bias",
    ),
    "critic": Way(
        "ppo",
        {"gamma": 0.999, "lam": 0.98, "value_clip": None},
        {"max_steps": 200, "num_envs": 16, "num_steps": 512, "hidden": (64, 64), "learning_rate": 1e-3,
         "num_iterations": 4, "num_minibatches": 16, "learning_rate_schedule": "linear"},
        "a critic on pieces of episodes (ppo): whole episodes are long, or slow because copies are stepped "
        "one "
        "by one",
    ),
    "continuous": Way(
        "ppo",
        {"gamma": 0.99},
        {"max_steps": 250, "num_envs": 16, "num_steps": 128, "hidden": (128, 128), "learning_rate": 1e-3,
         "num_iterations": 10, "num_minibatches": 8, "learning_rate_schedule": "linear",
         "normalize_observations": True},
        "a critic on pieces of episodes (ppo): the actions are continuous",
    ),
}  # fmt: skip
"""The rules of thumb of the advice."""
ENTROPY = 0.01
"""Entropy bonus, in standard deviations of what the advantages are made of (1 where they are whitened)."""
ENDLESS_GAMMA = 0.95
"""Discount of continuous control in which only the time limit ends an episode, such as Pendulum-v1."""
SLOW_STEPS = 10_000
"""Steps per update that are cheap even where environments are stepped one by one."""
MEASURED_STEPS = 20_000
"""Largest number of steps of a measurement, which still takes at least ten episodes."""
RARE = 0.1
"""The reward is called sparse if fewer episodes than this share have another return than the commonest."""


@dataclass(frozen=True)
class Returns:
    """Undiscounted returns of whole episodes of the untrained policy.

    Attributes:
        episodes: number of episodes.
        mean: mean return.
        sd: standard deviation of the returns (ddof 1).
        length: mean number of steps per episode.
        unusual: share of episodes whose return is not the commonest one.
        truncated: share of episodes that the time limit ended.
    """

    episodes: int
    mean: float
    sd: float
    length: float
    unusual: float
    truncated: float


def advise_environment(args: AdviseArguments) -> Advice:
    """Measure an environment and recommend settings for `tokenrl control`.

    Raises:
        Refused: the environment cannot be made, or fails in the measurement; the head cannot give its
            actions; there is no baseline although episodes may be longer than 500 steps.
    """
    check_choice("baseline", args.baseline or "none", [b for b in AXES["baseline"] if b != "remax"])
    spec = describe(args.env, args.max_episode_steps)
    check_head(args.head, spec.discrete)
    way = WAYS[choose_way(spec, args.baseline)]
    found = measure_returns(spec, args, way.arguments["hidden"])
    own: dict[str, Any] = {} if args.baseline in (None, "value") else {"baseline": args.baseline}
    if args.baseline == "running_mean":  # it starts at the mean that was measured, which is of other episodes
        own["running_mean_init"] = float(f"{found.mean:.2g}")
    estimator = Estimator.preset(way.preset, **way.axes | own)
    control = ControlArguments(
        env=args.env,
        estimator=estimator,
        max_episode_steps=args.max_episode_steps,
        head=spec.head,
        allow_no_baseline=args.allow_no_baseline,
        seed=args.seed,
        **way.arguments,
    )
    control = fitted(control, spec, found)
    why = "as you asked" + ("; plain REINFORCE" if args.baseline == "none" else "") if own else way.why
    return Advice(
        subject=spec.env,
        command="control",
        arguments=control,
        facts=_facts(control, spec, found),
        settings=_settings(control, spec, found, why),
        measurements={"environment": asdict(spec), "returns": asdict(found)},
        warnings=judge_horizon(estimator, spec.horizon, args.allow_no_baseline) + _doubts(spec, found),
    )


def choose_way(spec: Spec, baseline: str | None) -> str:
    """Choose a key of `WAYS`: whole episodes with or without a critic, or pieces of episodes with one.

    A baseline that was given decides about the critic; the environment decides whether episodes stay whole.
    Beyond 500 steps pieces learn faster also where steps are cheap: on CartPole with 1000 steps, in the same
    processor time, the mean return of all evaluations is 904 with pieces and 837 with whole episodes.
    """
    cheap = spec.fast or spec.horizon * WAYS["episodes"].arguments["num_envs"] <= SLOW_STEPS
    whole = spec.discrete and spec.horizon <= LONGEST_WITHOUT_BASELINE and cheap
    if baseline == "value":
        return "critic_episodes" if whole else "critic" if spec.discrete else "continuous"
    if whole or baseline is not None:
        return "episodes"
    return "critic" if spec.discrete else "continuous"


def measure_returns(spec: Spec, args: AdviseArguments, hidden: tuple[int, ...]) -> Returns:
    """Play episodes with a policy before training, whose actions are nearly random, and summarise them."""
    episodes = min(args.episodes, max(10, MEASURED_STEPS // spec.horizon))
    generator = torch.Generator().manual_seed(args.seed)
    shape = Shape(spec.observation_size, spec.head, spec.actions or spec.action_size, hidden)
    environments = Environments(args.env, episodes, args.max_episode_steps)
    try:
        policy = Policy(shape, generator)
        rollout = collect_episodes(environments, policy, spec.horizon, generator, seed=args.seed)
    except Stopped as error:  # nothing has been trained
        raise Refused(str(error)) from error
    finally:
        environments.close()
    totals = rollout.returns.double()
    (_, commonest), *_ = Counter(totals.tolist()).most_common(1)
    return Returns(
        episodes=len(totals),
        mean=float(totals.mean()),
        sd=float(totals.std()),
        length=float(rollout.lengths.double().mean()),
        unusual=1 - commonest / len(totals),
        truncated=float(rollout.truncated.double().mean()),
    )


def fitted(control: ControlArguments, spec: Spec, found: Returns) -> ControlArguments:
    """Set what follows from the returns: reward scale, discount, entropy bonus, number of environments."""
    estimator = control.estimator
    spread = found.sd or max(1.0, abs(found.mean))
    if estimator.needs_values:
        control = replace(control, reward_scale=one_figure(1 / spread))
        spread = 1.0  # returns are scaled to it
        if found.truncated == 1 and not spec.discrete:
            estimator = replace(estimator, gamma=ENDLESS_GAMMA)
    if spec.discrete:
        estimator = replace(estimator, entropy_coef=one_figure(ENTROPY * spread))
        control = replace(control, entropy_schedule="linear")
    slow = control.num_steps is None and not spec.fast and spec.horizon * control.num_envs > SLOW_STEPS
    envs = 16 if slow else control.num_envs
    return replace(control, estimator=estimator, num_envs=2 * envs if found.unusual < RARE else envs)


def _facts(control: ControlArguments, spec: Spec, found: Returns) -> dict[str, str]:
    """Return the facts that the advice shows, with the sizes of the policy that is advised."""
    critic = control.value_network if control.estimator.needs_values else None
    size = spec.actions or spec.action_size
    policy = Policy(Shape(spec.observation_size, spec.head, size, control.hidden, critic=critic))
    own = sum(p.numel() for p in policy.policy_parameters())
    values = sum(p.numel() for p in policy.value_parameters())
    layers = " x ".join(map(str, (spec.observation_size, *control.hidden)))
    outputs = (
        f"one logit for each of {size} actions" if spec.discrete else f"mean and log-std of {size} numbers"
    )
    beside = f"; the critic beside it has {values:,}" if values else ""
    return {
        "observations": f"{spec.observation_size}, flattened",
        "actions": f"{size}, {'discrete' if spec.discrete else 'continuous'}",
        "horizon": f"{spec.horizon:,} steps",
        "solved at": "no threshold" if spec.solved is None else f"mean return {spec.solved:g}",
        "untrained policy": f"return {found.mean:.4g} (sd {found.sd:.3g}), {found.length:.0f} steps, "
        f"{found.truncated:.0%} cut by the limit; {found.episodes} episodes of nearly random actions",
        "policy": f"{spec.head}, {own:,} parameters: {outputs}, after layers {layers}{beside}",
    }


def _doubts(spec: Spec, found: Returns) -> list[str]:
    """Return warnings about what may go wrong, judged by the returns."""
    if found.sd == 0 and spec.horizon > 1:
        return [
            f"all {found.episodes} random episodes have the return {found.mean:g}, and equal returns give a "
            "policy gradient no signal. Shape the reward, start episodes nearer the goal, or let them last "
            "longer (--max-episode-steps)."
        ]
    if found.unusual < RARE:
        return [
            f"the reward is sparse: only {found.unusual:.0%} of random episodes have an unusual return. The "
            "start will be slow and depends on the seed; a shaped reward helps most."
        ]
    if spec.solved is not None and found.mean >= spec.solved:
        return ["the untrained policy already reaches the threshold: there is little to learn here."]
    return []


def _settings(control: ControlArguments, spec: Spec, found: Returns, why: str) -> list[Setting]:
    """Return the recommended settings, each with its reason."""
    estimator, pieces = control.estimator, control.num_steps is not None
    returns = "rewards that came before an action are left out of its advantage"
    if estimator.returns == "gae":
        returns = f"GAE with lam {estimator.lam:g} trades the critic's bias for less noise"
    whitened = choice_of("scale", "token_whiten").status.replace("_", " ")
    bonus = f"{ENTROPY:g} of the spread of advantages, so that the policy explores at first"
    reasons = {
        "head": f"the actions are {'a finite list' if spec.discrete else 'real numbers'}",
        "hidden": "tanh layers; the default size for this kind of environment",
        "estimator.baseline": f"{why}; gradient {bias_in_words(estimator)}, an entropy bonus aside",
        "estimator.returns": returns,
        "estimator.scale": f"no division is exact, and Adam's steps have the same size whatever that of the "
        f"returns; whitening over the update (token_whiten) is {whitened}",
        "estimator.ratio": f"PPO's clip at {estimator.epsilon:g} lets a rollout be used more than once"
        if pieces
        else "on-policy: every rollout is used for one update only",
        "estimator.entropy_coef": bonus if spec.discrete else "the Gaussian learns its own spread",
        "entropy_schedule": "falls to 0, so that the last policy is not made random on purpose",
        "num_envs": "as many whole episodes per update",
        "max_grad_norm": "limits how far one unusual rollout can move the weights",
        "learning_rate": "Adam; halve it if the return rises and then falls",
        "max_steps": "updates; --stop-when-solved may end sooner where there is a threshold",
    }
    if pieces:
        actions = control.num_envs * (control.num_steps or 0)
        reach = 1 / (1 - estimator.gamma)
        reasons |= {
            "estimator.gamma": f"credit reaches about {reach:.0f} steps; nearer 1 for later rewards",
            "num_envs": f"{actions:,} actions per rollout",
            "num_steps": "pieces of episodes: the critic estimates the rest, so that updates need not wait",
            "num_iterations": "passes over each rollout; staler data gets clipped",
            "num_minibatches": f"{actions // control.num_minibatches:,} actions per update",
            "normalize_observations": "observations of different sizes slow learning",
        }
    if estimator.needs_values:
        reasons["reward_scale"] = (
            f"about 1 / sd of returns ({found.sd:.3g}): a critic learns targets of size 1"
        )
    out = []
    for name, reason in reasons.items():
        axis = name.removeprefix("estimator.")
        out.append(Setting(name, getattr(estimator if axis != name else control, axis), reason))
    return out
