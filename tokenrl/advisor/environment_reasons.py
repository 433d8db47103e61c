"""States the reasons of the advice for an environment: heads, facts, settings and warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tokenrl.advisor.rules import ENTROPY
from tokenrl.advisor.show import Head, Setting
from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Spec
from tokenrl.control.policies import Policy, Shape
from tokenrl.core.baselines import LONGEST_WITHOUT_BASELINE
from tokenrl.core.choices import choice_of
from tokenrl.core.estimator import Estimator

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


def heads(control: ControlArguments, spec: Spec) -> list[Head]:
    """Describe both heads; the number of parameters is that of the policy without its critic."""
    critic = control.value_network if control.estimator.needs_values else None
    size = spec.actions or spec.action_size
    policy = Policy(Shape(spec.observation_size, spec.head, size, control.hidden, critic=critic))
    own = sum(p.numel() for p in policy.policy_parameters())
    values = sum(p.numel() for p in policy.value_parameters())
    beside = f"; the critic beside it has {values:,}" if values else ""
    layers = " x ".join(map(str, (spec.observation_size, *control.hidden)))
    softmax = f"chosen: one logit for each of {spec.actions} actions, after layers {layers}{beside}"
    gaussian = (
        f"chosen: mean and log-std of each of {spec.action_size} numbers, after layers {layers}{beside}"
    )
    if spec.discrete:
        return [Head("softmax", own, softmax), Head("gaussian", None, "no: the actions are a finite list")]
    return [
        Head("gaussian", own, gaussian),
        Head("softmax", None, "no: the actions are vectors of real numbers"),
    ]


def facts(spec: Spec, found: Returns) -> dict[str, str]:
    """Return the facts that the advice shows."""
    actions = f"{spec.actions}, discrete" if spec.discrete else f"{spec.action_size}, continuous"
    return {
        "observations": f"{spec.observation_size}, flattened",
        "actions": actions,
        "horizon": f"{spec.horizon:,} steps",
        "solved at": "no threshold" if spec.solved is None else f"mean return {spec.solved:g}",
        "untrained policy": f"return {found.mean:.4g} (sd {found.sd:.3g}), {found.length:.0f} steps, "
        f"{found.truncated:.0%} cut by the limit; {found.episodes} episodes of nearly random actions",
        "speed": "many copies in one call" if spec.fast else "copies are stepped one by one",
    }


def doubts(spec: Spec, found: Returns) -> list[str]:
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


def settings(control: ControlArguments, spec: Spec, found: Returns, why_baseline: str) -> list[Setting]:
    """Return the recommended settings, each with its reason."""
    estimator, out = control.estimator, []
    critic, pieces = estimator.needs_values, control.num_steps is not None

    def say(name: str, reason: str) -> None:
        axis = name.removeprefix("estimator.")
        out.append(Setting(name, getattr(estimator if axis != name else control, axis), reason))

    say("head", "the actions are a finite list" if spec.discrete else "the actions are real numbers")
    say("hidden", "tanh layers; the default size for this kind of environment")
    say("estimator.baseline", f"{why_baseline}; gradient {_bias(estimator)}, an entropy bonus aside")
    say("estimator.returns", _why_returns(estimator))
    say("estimator.scale", why_scale(estimator))
    if pieces:
        reach = 1 / (1 - estimator.gamma)
        ends = "no random episode ended by itself: " if found.truncated == 1 else ""
        say("estimator.gamma", f"{ends}credit reaches about {reach:.0f} steps; nearer 1 for later rewards")
        say("estimator.ratio", f"PPO's clip at {estimator.epsilon:g} lets a rollout be used more than once")
    else:
        say("estimator.ratio", "on-policy: every rollout is used for one update only")
    if spec.discrete:
        white = "1 of whitened advantages" if estimator.scale == "token_whiten" else "1 of scaled returns"
        size = white if critic or estimator.scale == "token_whiten" else f"{found.sd:.3g} of the returns"
        say(
            "estimator.entropy_coef",
            f"{ENTROPY:g} of the spread ({size}), so that the policy explores at first",
        )
        say("entropy_schedule", "falls to 0, so that the last policy is not made random on purpose")
    else:
        say("estimator.entropy_coef", "the Gaussian learns its own spread, which starts at half the range")
    say("num_envs", _why_envs(control, found))
    if pieces:
        say(
            "num_steps",
            "pieces of episodes: the critic estimates the rest, so that updates need not wait for ends",
        )
        say("num_iterations", f"passes over each rollout, in {control.num_minibatches} minibatches; staler "
            "data gets clipped")  # fmt: skip
        say("num_minibatches", f"{_batch(control) // control.num_minibatches:,} actions per update")
        say("normalize_observations", "observations of different sizes slow learning" if
            control.normalize_observations else "left off; try it if learning is slow")  # fmt: skip
    if critic:
        say("reward_scale", f"about 1 / sd of returns ({found.sd:.3g}): a critic learns targets of size 1")
    say("max_grad_norm", "limits how far one unusual rollout can move the weights")
    say("learning_rate", "Adam; halve it if the return rises and then falls")
    steps = f"{control.max_steps * _batch(control, spec.horizon):,} steps of the environment"
    early = "" if spec.solved is None else "; --stop-when-solved may end sooner"
    say("max_steps", f"{'' if pieces else 'at most '}{steps}{early}")
    return out


def _batch(control: ControlArguments, horizon: int = 0) -> int:
    return control.num_envs * (control.num_steps or horizon)


def _why_envs(control: ControlArguments, found: Returns) -> str:
    if control.num_steps is not None:
        return f"{_batch(control):,} actions per rollout"
    error = found.sd / math.sqrt(control.num_envs)
    return f"as many whole episodes per update; the standard error of their mean return is {error:.2g}"


def why_critic(spec: Spec, way: str, asked: str | None) -> str:
    """Say why a critic is advised, and whether it learns from whole episodes or from pieces of them."""
    if way == "critic_episodes":
        return (
            f"a critic, as you asked, on whole episodes (a2c): with {spec.horizon:,} steps they are cheap, "
            "so that no rest is cut off that it would have to stand for, and its errors are no bias; pieces "
            "(ppo) take fewer steps of the environment and more time for each"
        )
    if not spec.discrete:
        why = "continuous actions"
    elif spec.horizon > LONGEST_WITHOUT_BASELINE:
        why = f"{spec.horizon:,} steps per episode"
    else:
        why = "copies are stepped one by one, too slow for whole episodes"
    return f"a critic on pieces of episodes (ppo){', as you asked' if asked else ''}: {why}"


def _why_returns(estimator: Estimator) -> str:
    if estimator.returns == "gae":
        return f"GAE with lam {estimator.lam:g} trades the critic's bias for less noise"
    plain = "the advantage of an action leaves out the rewards that came before it"
    return f"{plain}; nothing is bootstrapped" if estimator.needs_values else plain


def why_scale(estimator: Estimator) -> str:
    """Say why returns are normalised so, and what the other ways do to the expected gradient."""
    update = f"over the update (token_whiten) {_effect('scale', 'token_whiten')}"
    episode = (
        f"per episode (baseline episode_mean {_effect('baseline', 'episode_mean')}, scale episode_std "
        f"{_effect('scale', 'episode_std')})"
    )
    if estimator.scale == "token_whiten":
        return f"mean 0 and sd 1 over the update, whatever the rewards' size; {update}, {episode}"
    why = "no division, exact: Adam's steps have the same size whatever that of the returns"
    return f"{why}. Of the alternatives, {update}, {episode}"


def _effect(axis: str, name: str) -> str:
    return f"is {choice_of(axis, name).status.replace('_', ' ')}"


def _bias(estimator: Estimator) -> str:
    """Return the bias of an estimator in words; the bonus changes the objective, not the bias."""
    return replace(estimator, entropy_coef=0.0).bias_status.replace("_", " ")
