"""What user code does to settings of torch changes no bit of a run, wherever the code stands in it."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from tiny_models import letter_task, letters_trained, weights

from tokenrl import Estimator
from tokenrl.control import train_agent
from tokenrl.language import TransformersGenerator

left_open = []
calls = []


def change(where):
    """At the first call in this place, as of a judge that is loaded then, leave other settings behind."""
    if calls[0] == where:
        calls[0] = "done"
        torch.set_float32_matmul_precision("medium")
        torch.backends.cuda.enable_flash_sdp(False)
        left_open.append(torch.autocast("cpu", torch.bfloat16))
        left_open[-1].__enter__()
        torch.set_grad_enabled(False)


def counted(completions, **_):
    change("reward")
    return [float(text.count("a")) for text in completions]


async def awaited(completions, **_):
    change("async reward")
    return [0.0] * len(completions)


class Engine(TransformersGenerator):
    def __init__(self, policy, rows_at_once):
        super().__init__(policy, rows_at_once)
        change("engine")

    def generate(self, prompt_ids, sampling, draws):
        rollout = super().generate(prompt_ids, sampling, draws)
        change("generate")
        return rollout

    def sync(self, policy):
        super().sync(policy)
        change("sync")


def halves(totals, **_):
    change("baseline")
    return totals / 2


class Zeros:
    def read(self, keys):
        change("read")
        return torch.zeros(len(keys))

    def update(self, keys, rewards):
        change("update")

    def state_dict(self):
        change("state_dict")
        return {}

    def load_state_dict(self, state):
        change("load_state_dict")


class Letters:
    """Asks for letters, once."""

    def reset(self, seed=None):
        change("reset")
        return "ab>", {}

    def step(self, text):
        change("step")
        return "", float(text.count("a")), True, False, {}


OF_MEMORY = ("read", "update", "state_dict", "load_state_dict")
PLACES = [
    "reward",
    "async reward",
    "engine",
    "generate",
    "sync",
    "baseline",
    *OF_MEMORY,
    "callback",
]
PLACES += ["reset", "step"]


@pytest.mark.parametrize("place", PLACES)
def test_settings_that_user_code_leaves_behind_change_no_bit_of_a_training(place, tmp_path):
    baseline = Zeros if place in OF_MEMORY else halves
    options = {"generator": Engine} if place in ("engine", "generate", "sync") else {}
    if place in ("reset", "step"):
        options = {"environment": Letters}
    ended = []
    for name, switching in (("plain", "nowhere"), ("changed", place)):
        calls[:] = [switching]
        result = letters_trained(
            tmp_path / name,
            letter_task(counted),
            reward=(counted, awaited),
            estimator=Estimator(baseline=baseline),
            callback=lambda *_: change("callback"),
            save_every=1,
            **options,
        )
        ended.append(weights(result.policy.model))
    assert calls == ["done"] and torch.equal(*ended)


class Coin(gymnasium.Env):
    """Rewards the second of two actions, for ten steps."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        change("reset")
        return np.ones(2, np.float32), {}

    def step(self, action):
        change("step")
        return np.ones(2, np.float32), float(action), False, False, {}


@pytest.mark.parametrize("place", ["reset", "step"])
def test_settings_that_an_environment_leaves_behind_change_no_bit_of_an_agent(place, tmp_path):
    gymnasium.register("Coin-v0", entry_point=Coin, max_episode_steps=10)
    ended = []
    for name, switching in (("plain", "nowhere"), ("changed", place)):
        calls[:] = [switching]
        result = train_agent(
            env="Coin-v0", max_steps=3, num_envs=2, output_dir=tmp_path / name, quiet=True
        )
        ended.append([parameter.detach() for parameter in result.policy.parameters()])
    gymnasium.registry.pop("Coin-v0")
    assert calls == ["done"] and all(map(torch.equal, *ended))
