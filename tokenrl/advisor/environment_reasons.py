"""States the reasons of the advice for an environment: heads, facts, settings and warnings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from tokenrl.advisor.show import Head, Setting
from tokenrl.control.arguments import ControlArguments
from tokenrl.control.environments import Spec
from tokenrl.control.policies import Policy, Shape
from tokenrl.core.guards import LONGEST_WITHOUT_BASELINE

ENTROPY = 0.01
"""Entropy bonus for discrete actions, in standard deviations of the returns (or whitened advantages)."""
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


def settings(control: ControlArguments, spec: Spec, found: Returns, way: str) -> list[Setting]:
    """Return the recommended settings, each with its reason."""
    estimator, out = control.estimator, []
    critic = estimator.needs_values

    def say(name: str, reason: str) -> None:
        axis = name.removeprefix("estimator.")
        out.append(Setting(name, getattr(estimator if axis != name else control, axis), reason))

    say("head", "the actions are a finite list" if spec.discrete else "the actions are real numbers")
    say("hidden", "tanh layers; the default size for this kind of environment")
    say("estimator.baseline", _why_baseline(control, spec, way))
    if critic:
        say("estimator.returns", f"GAE with lam {estimator.lam:g} trades the critic's bias for less noise")
        say("estimator.scale", "advantages of mean 0 and sd 1 over the update, whatever the rewards' size")
        reach = 1 / (1 - estimator.gamma)
        ends = "no random episode ended by itself: " if found.truncated == 1 else ""
        say("estimator.gamma", f"{ends}credit reaches about {reach:.0f} steps; nearer 1 for later rewards")
        say("estimator.ratio", f"PPO's clip at {estimator.epsilon:g} lets a rollout be used more than once")
    else:
        say("estimator.returns", "the advantage of an action leaves out the rewards that came before it")
        say("estimator.ratio", "on-policy: every rollout is used for one update only")
    if spec.discrete:
        size = "1 of whitened advantages" if critic else f"{found.sd:.3g} of the returns"
        say(
            "estimator.entropy_coef",
            f"{ENTROPY:g} of the spread ({size}), so that the policy explores at first",
        )
        say("entropy_schedule", "falls to 0, so that the last policy is not made random on purpose")
    else:
        say("estimator.entropy_coef", "the Gaussian learns its own spread, which starts at half the range")
    say("num_envs", _why_envs(control, found))
    if critic:
        say(
            "num_steps",
            "pieces of episodes: the critic estimates the rest, so that updates need not wait for ends",
        )
        say("num_iterations", f"passes over each rollout, in {control.num_minibatches} minibatches; staler "
            "data gets clipped")  # fmt: skip
        say("num_minibatches", f"{_batch(control) // control.num_minibatches:,} actions per update")
        say("reward_scale", f"about 1 / sd of returns ({found.sd:.3g}): a critic learns targets of size 1")
        say("normalize_observations", "observations of different sizes slow learning" if
            control.normalize_observations else "left off; try it if learning is slow")  # fmt: skip
    say("max_grad_norm", "limits how far one unusual rollout can move the weights")
    say("learning_rate", "Adam; halve it if the return rises and then falls")
    steps = f"{control.max_steps * _batch(control, spec.horizon):,} steps of the environment"
    early = "" if spec.solved is None else "; --stop-when-solved may end sooner"
    say("max_steps", f"{'' if critic else 'at most '}{steps}{early}")
    return out


def _batch(control: ControlArguments, horizon: int = 0) -> int:
    return control.num_envs * (control.num_steps or horizon)


def _why_envs(control: ControlArguments, found: Returns) -> str:
    if control.num_steps is not None:
        return f"{_batch(control):,} actions per rollout"
    error = found.sd / math.sqrt(control.num_envs)
    return f"as many whole episodes per update; the standard error of their mean return is {error:.2g}"


def _why_baseline(control: ControlArguments, spec: Spec, way: str) -> str:
    baseline = control.estimator.baseline
    plain = replace(control.estimator, entropy_coef=0.0)  # the bonus changes the objective, not the bias
    status = plain.bias_status.replace("_", " ")
    if way != "episodes":
        why = "a critic: " + ("continuous actions" if not spec.discrete else
               f"{spec.horizon:,} steps per episode" if spec.horizon > LONGEST_WITHOUT_BASELINE else
               "copies are stepped one by one, too slow for whole episodes")  # fmt: skip
    elif baseline == "timestep_mean":
        why = "episodes are short and many: the mean of the others at the same step needs no critic"
    elif baseline == "none":
        why = "as you asked: plain REINFORCE, the noisiest choice"
    else:
        why = "as you asked"
    return f"{why}; gradient {status}, an entropy bonus aside"
