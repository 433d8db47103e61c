"""One update of an agent: its gradient is the estimator's, whatever the padding, the parts and the layout."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from drawing import normals, seeded
from refusals import stopped
from torch.testing import assert_close

from tokenrl.control.arguments import ControlArguments
from tokenrl.control.policies import Policy, Shape
from tokenrl.control.rollouts import Rollout
from tokenrl.control.update import Agent, learn, loss_units, scheduled
from tokenrl.core import Estimator

LENGTHS = torch.tensor([4, 2, 3, 1])


def rollout_of(*, width=4):
    """Four rows: 0 and 3 terminated, 1 met the time limit, 2 goes on."""
    draw = seeded(0)
    mask = torch.arange(width) < LENGTHS[:, None]
    rewards = normals(draw, 4, 4)
    actions = torch.randint(2, (4, 4), generator=draw)
    observations = normals(draw, 4, 4, 3)
    final = normals(draw, 4, 3)
    wider = torch.nn.functional.pad
    observations = wider(observations, (0, 0, 0, width - 4), value=9e9)
    rewards, actions = (wider(x, (0, width - 4)) for x in (rewards, actions))
    rewards = rewards * mask
    terminated, truncated = torch.tensor([[1, 0, 0, 1], [0, 1, 0, 0]]).bool()
    return Rollout(
        observations, actions, rewards, mask, terminated, truncated, final, rewards.sum(1), LENGTHS
    )


def agent_of(estimator, *, critic="separate", **options):
    settings = {
        "num_envs": 4,
        "learning_rate": 0.1,
        "max_grad_norm": 0.0,
        "max_steps": 10,
    } | options
    args = ControlArguments(estimator=estimator, hidden=(4,), value_network=critic, **settings)
    used = critic if "values" in estimator.needs else None
    shape = Shape(
        3, "softmax", 2, (4,), critic=used, normalize_observations=args.normalize_observations
    )
    policy = Policy(shape, seeded(1)).double()
    return Agent(
        policy=policy,
        args=args,
        horizon=10,
        optimizer=torch.optim.SGD(policy.parameters(), lr=args.learning_rate),
        memory=estimator.memory(),
        generator=seeded(2),
    )


def weights(agent):
    return torch.cat([p.detach().reshape(-1) for p in agent.policy.policy_parameters()])


def moved(agent, rollout, step=1):
    """What plain gradient ascent adds to the weights, a unit of learning rate."""
    before = weights(agent)
    learn(agent, rollout, step)
    return (weights(agent) - before) / agent.args.learning_rate


def slope_of(agent, objective):
    return torch.cat(
        [x.reshape(-1) for x in torch.autograd.grad(objective, agent.policy.policy_parameters())]
    )


def logprobs_of(agent, rollout):
    chosen = agent.policy(rollout.observations.clamp(max=9)).log_softmax(-1)
    return chosen.gather(-1, rollout.actions[..., None]).squeeze(-1)


@pytest.mark.parametrize("row", [0, 2])  # an episode that terminates, and one that is cut
def test_the_update_of_the_textbook_agent_of_the_walk(row):
    """One episode, returns normalised over its steps, then V subtracted; V learns the normalised returns."""
    estimator = Estimator(
        baseline="value", returns="episode_normalized", gamma=0.99, scale_eps=1e-8,
        aggregation="sequence_mean",
    )  # fmt: skip
    agent = agent_of(estimator, critic="shared", value_coef=0.7, max_grad_norm=0.5)
    rollout = Rollout(*(x[row : row + 1] for x in rollout_of()))
    n = int(LENGTHS[row])
    discounts = 0.99 ** torch.arange(n, dtype=torch.double)
    to_go = torch.stack([discounts[: n - t] @ rollout.rewards[0, t:n] for t in range(n)])
    returns = (to_go - to_go.mean()) / (to_go.std() + 1e-8)
    logprobs = logprobs_of(agent, rollout)[0, :n]
    values = agent.policy.values(rollout.observations[0, :n])
    loss = -(logprobs * (returns - values.detach())).mean()
    slope = slope_of(agent, loss + 0.7 * 0.5 * (values - returns).square().mean())
    norm = float(slope.norm())
    before = weights(agent)
    metrics = learn(agent, rollout, 1)
    assert metrics["grad_norm"] == pytest.approx(norm) and metrics["grad_clipped"] == (norm > 0.5)
    assert_close((weights(agent) - before) / 0.1, -slope * min(1.0, 0.5 / (norm + 1e-6)))


EVERY = [
    Estimator(baseline="none"),
    Estimator(baseline="timestep_mean", returns="reward_to_go"),
    Estimator(baseline="optimal", returns="reward_to_go", optimal_form="cumulative"),
    Estimator(baseline="episode_mean", scale="episode_std", returns="reward_to_go", gamma=0.9),
    Estimator(baseline="value", returns="episode_normalized", gamma=0.9),
    Estimator.preset("a2c"),
    Estimator.preset("ppo", gamma=0.9, entropy_coef=0.1),
    Estimator(baseline="batch_mean", aggregation="fixed_length", entropy_coef=0.3),
]


@pytest.mark.parametrize("estimator", EVERY, ids=lambda e: f"{e.baseline}-{e.returns}-{e.scale}")
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_neither_padding_nor_layout_changes_an_update(estimator, critic, monkeypatch):
    from tokenrl.control import update

    move = moved(agent_of(estimator, critic=critic), rollout_of())
    assert_close(moved(agent_of(estimator, critic=critic), rollout_of(width=7)), move)
    assert move.abs().sum() > 1e-4
    monkeypatch.setattr(update, "one_by_one", lambda rows: rows)
    assert_close(moved(agent_of(estimator, critic=critic), rollout_of()), move)


WHOLE_ROWS = [
    Estimator(baseline="timestep_mean", returns="reward_to_go", ratio="sequence_product"),
    Estimator(baseline="batch_mean", returns="reward_to_go", ratio="sequence_mean"),
    Estimator(baseline="batch_mean", aggregation="token_mean", ratio="geometric_clip"),
]


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("estimator", [EVERY[1], EVERY[5], *WHOLE_ROWS], ids=lambda e: e.ratio)
def test_minibatches_are_each_an_unbiased_part(estimator, parts):
    """With a learning rate near 0 the mean of the minibatches' moves is the move of all at once."""
    tiny = {"learning_rate": 1e-7}
    rollout = rollout_of()
    whole = moved(agent_of(estimator, **tiny), rollout)
    if not estimator.chosen("ratio").whole_row:
        parts = 2  # of which the number of actions is a multiple
    mean = moved(agent_of(estimator, num_minibatches=parts, **tiny), rollout) / parts
    assert_close(mean, whole, rtol=1e-4, atol=1e-5)


def test_the_first_of_several_passes_has_ratio_one():
    """With one pass the clipped ratio is REINFORCE; with two the second differs from it."""
    plain = Estimator(baseline="rloo", returns="total")
    clipped = replace(plain, ratio="token")
    for passes in (1, 2):
        moves = [moved(agent_of(e, num_iterations=passes), rollout_of()) for e in (plain, clipped)]
        assert torch.allclose(*moves, rtol=1e-3) == (passes == 1)


@pytest.mark.parametrize(
    ("gamma", "options", "goes_on"),
    [(0.9, {}, [0, 1, 1, 0]), (1.0, {}, [0, 0, 1, 0]), (0.9, {"time_limits": "end"}, [0, 0, 1, 0])],
    ids=["discounted", "undiscounted", "an end"],
)
def test_what_follows_a_cut_or_a_time_limit_is_the_critics_value(gamma, options, goes_on):
    """Rows 0 and 3 terminated, 1 met the time limit, 2 goes on; the last target is r + gamma V."""
    estimator = Estimator(baseline="value", returns="gae", lam=0.9, gamma=gamma)
    agent, rollout = agent_of(estimator, **options), rollout_of()
    values = agent.policy.values(rollout.final_observations).detach()
    flat, _ = loss_units(agent, estimator, rollout)
    rewards = rollout.rewards[torch.arange(4), LENGTHS - 1]
    expected = rewards + gamma * torch.tensor(goes_on) * values
    assert_close(flat.returns[LENGTHS.cumsum(0) - 1, 0], expected)


def test_an_entropy_bonus_raises_the_entropy_and_falls_with_its_schedule():
    estimator = Estimator(baseline="none", entropy_coef=1.0)
    rollout = rollout_of()._replace(rewards=torch.zeros(4, 4, dtype=torch.double))
    agent = agent_of(estimator, entropy_schedule="linear")
    agent.policy.head.weight.data.mul_(200)
    entropies = [learn(agent, rollout, 1)["entropy"] for _ in range(30)]
    assert entropies[-1] > entropies[0] + 0.01
    coefficients = [scheduled(agent.args, step).entropy_coef for step in (1, 6, 10)]
    assert coefficients == pytest.approx([1.0, 0.5, 0.1])


def test_running_mean_and_scale_of_observations_learn_after_their_use():
    estimator = Estimator(baseline="running_mean", running_mean_decay=0.5, running_mean_init=3.0)
    scaled = agent_of(estimator, reward_scale=2.0, normalize_observations=True)
    plain = agent_of(estimator, reward_scale=2.0)
    assert_close(moved(scaled, rollout_of()), moved(plain, rollout_of()))
    assert scaled.policy.scale.count == LENGTHS.sum()
    expected = 0.5 * 3.0 + 0.5 * 2 * float(rollout_of().returns.mean())
    assert learn(scaled, rollout_of(), 2)["baseline"] == pytest.approx(expected)


def test_the_critic_alone_learns_in_its_warm_up():
    agent = agent_of(Estimator.preset("a2c"), value_warmup=1)
    parts = agent.policy.policy_parameters(), agent.policy.value_parameters()
    before = [[p.detach().clone() for p in part] for part in parts]
    for step, moves in ((1, False), (2, True)):
        learn(agent, rollout_of(), step)
        policy, critic = (
            any(not torch.equal(p, old) for p, old in zip(part, olds, strict=True))
            for part, olds in zip(parts, before, strict=True)
        )
        assert (policy, critic) == (moves, True)


def test_a_gradient_that_is_not_finite_is_skipped_and_two_in_a_row_stop():
    agent, broken = agent_of(Estimator(baseline="none"), stop_after_nonfinite=2), rollout_of()
    broken.rewards[0, 0] = math.inf
    before = weights(agent)
    learn(agent, broken, 1)
    assert torch.equal(weights(agent), before)
    learn(agent, rollout_of(), 2)
    learn(agent, broken, 3)
    with stopped("2 updates in a row"):
        learn(agent, broken, 4)
    assert agent.skipped == 3


def test_a_constant_that_all_rewards_hold_changes_no_advantage():
    """Each row has the reward 10^9 or a little more, in its first step; float32 holds multiples of 64 there."""
    agent = agent_of(Estimator(baseline="batch_mean", scale="batch_std"))
    agent.policy.float()
    rollout = rollout_of()
    rollout = rollout._replace(
        observations=rollout.observations.float(),
        final_observations=rollout.final_observations.float(),
    )
    advantages = []
    for constant in (0.0, 1e9):
        rewards = torch.zeros(4, 4, dtype=torch.double)
        rewards[:, 0] = constant + torch.tensor([0.0, 1, 2, 5]).double()
        units, _ = loss_units(agent, agent.args.estimator, rollout._replace(rewards=rewards))
        advantages.append(units.advantages)
    assert advantages[1].dtype == torch.float32 and advantages[0].abs().max() > 1
    assert_close(*advantages)
