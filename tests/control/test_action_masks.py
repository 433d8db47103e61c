"""Masks of actions: one policy draws, scores and is evaluated, and the gradient is that of this policy."""

from __future__ import annotations

import shutil
from itertools import product

import gymnasium
import numpy as np
import pytest
import torch
from drawing import normals, seeded
from gymnasium import spaces
from refusals import refused, stopped
from test_control_resume import PIECES, SMALL, results
from test_control_update import agent_of
from torch.nn.functional import pad

from tokenrl import train_agent
from tokenrl.control.environments import Environments
from tokenrl.control.policies import Policy, Shape, read_policy
from tokenrl.control.rollouts import Rollout, collect_episodes
from tokenrl.control.update import learn
from tokenrl.core import Estimator

ID = "tokenrl-tests/Doors-v0"
DOORS = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 1]], np.int8)
"""The actions that each state allows; state 1 allows only one."""
OPEN = np.ones_like(DOORS)


class Doors(gymnasium.Env):
    """An action moves on by 1 to 3 states of three in a circle; one that is not allowed is an error.

    The mask of the end is missing.
    """

    observation_space, action_space = spaces.Discrete(3), spaces.Discrete(3)

    def __init__(self, mask=None):
        self.mask = mask or (lambda _: DOORS[self.state])

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps, self.length = 0, 0, 2 + self.np_random.integers(4)
        return 0, self.facts()

    def facts(self):
        mask = self.mask(self.steps) if self.steps < self.length else None
        return {} if mask is None else {"action_mask": mask}

    def step(self, action):
        assert DOORS[self.state, action], "the door is locked"
        self.state, self.steps = (self.state + int(action) + 1) % 3, self.steps + 1
        return self.state, float(action), self.steps == self.length, False, self.facts()


class Method(Doors):
    """The masks of its method go before those in the facts; it is not called at an end."""

    def action_masks(self):
        assert self.steps < self.length
        return DOORS[self.state] > 0

    def facts(self):
        return {"action_mask": OPEN[0]}


class Continuous(Doors):
    action_space = spaces.Box(-1, 1, (2,))


def register(entry=Doors, **options):
    gymnasium.registry.pop(ID, None)
    settings = {"max_episode_steps": 9, "disable_env_checker": True}
    gymnasium.register(ID, entry_point=entry, kwargs=options, **settings)
    return ID


def masked_policy():
    policy = Policy(Shape(3, "softmax", 3, (), action_masks=True), seeded(3)).double()
    policy.head.weight.data = normals(seeded(4), 3, 3)
    return policy


@pytest.mark.parametrize("entry", [Doors, Method])
@pytest.mark.parametrize("options", [PIECES, PIECES | {"num_steps": None}], ids=["pieces", "whole"])
def test_no_locked_door_is_tried_and_a_continuation_ends_equal(tmp_path, said, entry, options):
    """In training, evaluations, greedy episodes, and by the saved policy; without its masks the run fails."""
    options = {**SMALL, "env": register(entry), **options}
    run = train_agent(output_dir=tmp_path / "run", **options).output_dir
    assert "3 actions, masked" in said()
    collect_episodes(Environments(ID, 20), read_policy(run), seeded(0), seed=5)
    if options["num_steps"] is None:
        copy = shutil.copytree(run, tmp_path / "copy")
        train_agent(output_dir=copy, resume=str(copy / "checkpoints/step_000003"), **options)
        assert results(copy) == results(run)
    options |= {"output_dir": tmp_path / "off", "action_masks": "off"}
    with refused("the door is locked"):
        train_agent(**options)
    with refused("action_masks"):
        train_agent(load=str(run), **options, overwrite=True)


@pytest.mark.parametrize("doors", [DOORS, OPEN], ids=["as drawn", "unmasked"])
def test_the_expected_move_is_the_gradient_of_the_return_if_scored_under_the_masks_of_drawing(
    doors,
):
    """All episodes of three steps as one rollout, in which the chance of each is a factor of its reward."""
    agent = agent_of(Estimator.preset("reinforce"))
    agent.policy = masked_policy()
    start = agent.policy.head.weight.detach().clone().requires_grad_()  # [A, S]
    agent.optimizer = torch.optim.SGD(agent.policy.parameters(), lr=1.0)
    actions = torch.tensor([*product(range(3), repeat=3)])
    states = pad(actions + 1, (1, 0)).cumsum(1)[:, :3] % 3
    allowed = start.exp() * torch.tensor(DOORS).T
    chances = (allowed / allowed.sum(0))[actions, states].prod(1)
    (wanted,) = torch.autograd.grad(chances @ actions.sum(1).double(), start)
    possible = chances > 0
    actions, mask = actions[possible], torch.ones(possible.sum(), 3).bool()
    rewards = (actions * chances.detach()[possible, None]) * len(actions)
    seen = torch.cat([torch.eye(3), torch.tensor(doors)], 1).double()[states[possible]]
    ends = mask[:, 0]
    rows = Rollout(
        seen, actions, rewards, mask, ends, ~ends, seen[:, 0], rewards.sum(1), mask.sum(1)
    )
    learn(agent, rows, 1)
    difference = (agent.policy.head.weight - start - wanted).abs().max()
    assert difference < 1e-12 if doors is DOORS else difference > 0.05
    assert not wanted[:, 1].any()  # a single door


@pytest.mark.parametrize(
    ("message", "mask"),
    [
        (r"1 steps after .*\[1 1\], of shape \(2,\)", lambda t: DOORS[0, : 3 - t]),
        (r"0 steps after .*\[0 0 0\]", lambda _: DOORS[0] * 0),
        (r"0 steps after .*\[0.5 1.  1. \]", lambda _: np.array([0.5, 1, 1])),
        (r"1 steps after .*None, of shape \(\)", lambda t: None if t else DOORS[0]),
    ],
)
def test_masks_that_cannot_be_used(message, mask):
    env = register(mask=mask)
    with stopped(f"The environment {ID} gave no mask .*copy 0.*{message}.*action_masks 'off'"):
        collect_episodes(Environments(env, 1), masked_policy().float(), seeded(0), seed=0)


def test_masks_that_no_run_takes(tmp_path, monkeypatch):
    options = {"output_dir": tmp_path, "env": ID, **SMALL}
    register(Continuous)
    with refused("its actions are continuous.*'off'"):
        train_agent(**options)
    monkeypatch.setattr("test_action_masks.DOORS", OPEN)
    register(mask=lambda steps: OPEN[0] if steps else None)
    with refused(r"from step\(\) and none from reset\(\)"):
        train_agent(**options)
