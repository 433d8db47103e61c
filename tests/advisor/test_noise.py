"""The measured noise of the gradient against closed forms, and the baseline that follows from it."""

from __future__ import annotations

import math
from dataclasses import replace

import gymnasium
import pytest
import torch

from tokenrl.advisor.arguments import AdviseArguments
from tokenrl.advisor.baseline import choose_baseline, unfit
from tokenrl.advisor.environment import advise_environment
from tokenrl.advisor.environment_reasons import Returns
from tokenrl.advisor.noise import NAMES, Noise, advantages, gradients, measure_noise
from tokenrl.control.environments import Spec
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import Rollout

BANDIT = Spec("tokenrl/Bandit-v0", 1, 2, 0, 1, None, fast=False)
GRID = Spec("tokenrl/GridWorld-v0", 16, 4, 0, 50, 0.93, fast=False)
FOUND = Returns(episodes=50, mean=0.5, sd=0.5, length=1.0, unusual=0.5, truncated=0.0)


def rows(rewards: torch.Tensor, actions: torch.Tensor, mask: torch.Tensor | None = None) -> Rollout:
    """Episodes of a bandit, which observes only a 1."""
    n, t = rewards.shape
    mask = torch.ones(n, t, dtype=torch.bool) if mask is None else mask
    ended = torch.ones(n, dtype=torch.bool)
    seen, last = torch.ones(n, t, 1), torch.ones(n, 1)
    steps = int(mask.sum())
    return Rollout(seen, actions, rewards, mask, ended, ~ended, last, rewards.sum(1), mask.sum(1), steps)


def linear(theta: float) -> Policy:
    """A policy with logits w + b that takes action 0 with probability sigmoid(theta)."""
    policy = Policy(Shape(1, "softmax", 2, ()))
    with torch.no_grad():
        policy.head.weight.zero_()
        policy.head.bias.copy_(torch.tensor([theta, 0.0]))
    return policy


@pytest.mark.parametrize("rewards", [(1.0, 0.0), (2.0, 0.5), (-1.0, 3.0)])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_noise_is_the_closed_form_of_the_bandit(rewards, share):
    """The episodes have exactly the frequencies of the policy, so that their variance is the true one.

    The score in the four parameters (two weights, two biases) is that in theta, twice with either sign. The
    estimate divides by N - 1, and a mean without the own episode makes each advantage N / (N - 1) as large.
    """
    theta, n = math.log(share / (1 - share)), 50
    actions = (torch.arange(n) >= share * n).long()[:, None]
    found = measure_noise(linear(theta), rows(torch.tensor(rewards)[actions], actions))
    correction = 4 * n / (n - 1)
    spread, rare = share * (1 - share), 1 - share  # of a score: its variance, and its value for action 0
    none = spread * (rewards[0] * rare + rewards[1] * share) ** 2 * correction
    centred = spread * ((rewards[0] - rewards[1]) * (rare - share)) ** 2 * correction
    assert found["none"].trace == pytest.approx(none, rel=1e-4)
    assert found["whitened"].trace == pytest.approx(centred, rel=1e-4, abs=1e-8)
    without_own = centred * (n / (n - 1)) ** 2
    for name in ("running_mean", "timestep_mean"):  # in one step, both are the mean of the others
        assert found[name].trace == pytest.approx(without_own, rel=1e-4, abs=1e-8)
    if share == 0.5:  # a fair coin leaves the two gradient samples equal: no noise at all
        assert found["whitened"].trace == 0 and found["none"].ratio == math.inf


def test_each_baseline_subtracts_what_its_name_says():
    rewards, actions = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.zeros(2, 2, dtype=torch.long)
    found = {name: table.tolist() for name, table in advantages(rows(rewards, actions)).items()}
    assert found == {
        "none": [[2, 1], [1, 0]],
        "whitened": [[1, 0], [0, -1]],  # the mean of all four is 1
        "running_mean": [[1, 0], [-1, -2]],  # the return of the other episode: 1, and 2
        "timestep_mean": [[1, 1], [-1, -1]],
    }


def test_padding_has_no_part_in_the_gradient():
    rewards = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.5, 0.0]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 0]]).bool()
    actions = torch.tensor([[0, 1], [1, 0], [1, 1]])
    policy = linear(0.3)
    one = gradients(policy, rows(rewards, actions, mask))
    other = gradients(policy, rows(rewards, torch.tensor([[0, 0], [1, 0], [1, 0]]), mask))
    assert all(torch.equal(one[name], other[name]) for name in NAMES)
    score = torch.tensor([1.0, -1.0]) * (1 - torch.sigmoid(torch.tensor(0.3)))  # in the two biases
    assert one["none"][0, 2:].tolist() == pytest.approx(score.tolist())


def test_the_error_of_a_ratio_is_that_of_repeated_samples():
    """The spread of 40 ratios has an error of about 11 % itself.

    The rewards are random, since with two outcomes all the episodes have the same ratio.
    """
    generator, policy = torch.Generator().manual_seed(0), linear(0.5)
    found = []
    for _ in range(40):
        actions = (torch.rand(50, 1, generator=generator) > torch.sigmoid(torch.tensor(0.5))).long()
        rewards = torch.tensor([1.0, 0.0])[actions] + torch.randn(50, 1, generator=generator)
        noise = measure_noise(policy, rows(rewards, actions))
        found.append((noise["none"].ratio, noise["none"].stderr))
    ratios, errors = torch.tensor(found).T
    assert float(ratios.mean()) > 1.05 and float(ratios.std()) > 0.05
    assert float(errors.mean()) == pytest.approx(float(ratios.std()), rel=0.35)


def noises(**ratios: float) -> dict[str, Noise]:
    return {name: Noise(ratios[name], ratios[name], 0.0) for name in NAMES}


NONE_IS_BEST = noises(none=1.0, whitened=1.2, running_mean=1.3, timestep_mean=1.4)
CONSTANT_IS_BEST = noises(none=3.0, whitened=1.0, running_mean=1.05, timestep_mean=1.05)
STEPS_ARE_BEST = noises(none=1.7, whitened=1.02, running_mean=3.0, timestep_mean=1.0)
LAGGING_IS_BEST = noises(none=3.0, whitened=1.2, running_mean=1.0, timestep_mean=1.05)


@pytest.mark.parametrize(
    ("spec", "measured", "name"),
    [
        (BANDIT, NONE_IS_BEST, "none"),  # one step and no threshold: the measurement decides
        (BANDIT, CONSTANT_IS_BEST, "whitened"),
        (BANDIT, LAGGING_IS_BEST, "running_mean"),
        (BANDIT, STEPS_ARE_BEST, "timestep_mean"),
        (replace(GRID, solved=0.4), NONE_IS_BEST, "none"),  # within one sd (0.5) of 0
        # Returns will grow to 1.9 sd, so none is out; a running mean would do (1.3 against 1.2), but lags.
        (GRID, NONE_IS_BEST, "whitened"),
        (GRID, CONSTANT_IS_BEST, "whitened"),
        (replace(GRID, solved=6.0), CONSTANT_IS_BEST, "timestep_mean"),  # 11 sd away
        (replace(GRID, solved=None), CONSTANT_IS_BEST, "timestep_mean"),  # who knows
    ],
)
def test_the_simplest_close_to_the_lowest_unless_returns_will_change(spec, measured, name):
    assert choose_baseline(spec, FOUND, measured).name == name


def test_equal_returns_leave_nothing_to_choose_by():
    flat = replace(FOUND, sd=0.0)
    assert choose_baseline(GRID, flat, NONE_IS_BEST).name == "timestep_mean"
    assert set(unfit(GRID, flat)) == {"none", "whitened", "running_mean"}


def axes_of(env: str, **options):
    advice = advise_environment(AdviseArguments(env=env, **options))
    reasons = {setting.name: setting.reason for setting in advice.settings}
    return advice, advice.arguments.estimator, reasons


def test_what_the_known_environments_get():
    """Gridworld learns fastest so of the four, and CartPole was tuned with its own."""
    advice, grid, reasons = axes_of("gridworld")
    assert (grid.baseline, grid.scale, grid.entropy_coef) == ("none", "token_whiten", 0.01)
    found = advice.measurements["noise"]
    assert set(found) == set(NAMES) and min(noise.ratio for noise in found.values()) == 1
    assert f"running_mean {found['running_mean'].ratio:.3g}" in reasons["estimator.baseline"]
    assert (
        "asymptotic" in reasons["estimator.baseline"] and "none is ruled out" in reasons["estimator.baseline"]
    )
    assert "gradient noise" in advice.facts
    _, cartpole, reasons = axes_of("CartPole-v1")
    assert (cartpole.baseline, cartpole.scale) == ("timestep_mean", "none")
    assert "sd away" in reasons["estimator.baseline"] and "gradient exact" in reasons["estimator.baseline"]


def test_every_way_to_normalise_is_named_with_its_bias():
    for env in ("gridworld", "walk", "Pendulum-v1"):
        _, _, reasons = axes_of(env, episodes=4)
        said = reasons["estimator.scale"]
        assert "token_whiten) is asymptotic" in said
        assert "episode_mean is biased" in said and "episode_std is biased" in said


def test_centred_rewards_in_one_step_need_no_baseline():
    if "tests/Centred-v0" not in gymnasium.registry:
        gymnasium.register(
            "tests/Centred-v0",
            entry_point="tokenrl.control.worlds.bandit:Bandit",
            max_episode_steps=1,
            kwargs={"rewards": (1.0, -1.0)},
        )
    _, estimator, reasons = axes_of("tests/Centred-v0")
    assert (estimator.baseline, estimator.scale) == ("none", "none")
    assert "take running_mean if the mean return leaves 0" in reasons["estimator.baseline"]


def test_a_running_mean_that_was_asked_for_starts_at_the_measured_mean():
    advice, estimator, reasons = axes_of("gridworld", baseline="running_mean")
    mean = advice.measurements["returns"].mean
    assert estimator.running_mean_init == float(f"{mean:.2g}")
    assert reasons["estimator.baseline"].startswith("as you asked; gradient noise")


def test_a_critic_learns_from_whole_episodes_where_they_are_cheap():
    advice, estimator, reasons = axes_of("gridworld", baseline="value")
    assert (estimator.baseline, estimator.returns, estimator.scale) == ("value", "reward_to_go", "none")
    assert advice.arguments.num_steps is None and estimator.ratio == "none"
    assert "a2c" in reasons["estimator.baseline"] and "gradient exact" in reasons["estimator.baseline"]
    assert {"num_steps", "num_iterations"} & set(reasons) == set() and "reward_scale" in reasons
    advice, estimator, reasons = axes_of("Acrobot-v1", baseline="value", episodes=2)
    assert advice.arguments.num_steps == 512 and estimator.returns == "gae"
    assert "ppo), as you asked: copies are stepped one by one" in reasons["estimator.baseline"]
