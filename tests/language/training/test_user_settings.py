"""What user code does to settings of torch changes no bit of a run, wherever the code stands in it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import letter_task, letters_trained, weights

from tokenrl import Estimator
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


OF_ENGINE = ("engine", "generate", "sync")
OF_MEMORY = ("read", "update", "state_dict", "load_state_dict")
OF_ENVIRONMENT = ("reset", "step")
PLACES = ("reward", "async reward", "baseline", "callback", *OF_ENGINE, *OF_MEMORY, *OF_ENVIRONMENT)


@pytest.mark.parametrize("place", PLACES)
def test_settings_that_user_code_leaves_behind_change_no_bit_of_a_training(place, tmp_path):
    options = {"generator": Engine} if place in OF_ENGINE else {}
    options |= {"environment": Letters} if place in OF_ENVIRONMENT else {}
    options["estimator"] = Estimator(baseline=Zeros if place in OF_MEMORY else halves)
    options |= {"reward": (counted, awaited), "callback": lambda *_: change("callback")}
    ended = []
    for switching in ("nowhere", place):
        calls[:] = [switching]
        folder = tmp_path / switching
        result = letters_trained(folder, letter_task(counted), save_every=1, **options)
        ended.append(weights(result.policy.model))
    assert calls == ["done"] and torch.equal(*ended)
