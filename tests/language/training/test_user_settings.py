"""What user code does to settings of torch changes no bit of a run, wherever the code stands in it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import letter_task, letters_trained, weights

from tokenrl import Estimator
from tokenrl.language import TransformersGenerator

left_open, changed = [], set()


def change(where):
    """At the first call in this place, as of a judge that is loaded then, leave other settings behind."""
    if where in switching and where not in changed:
        changed.add(where)
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


MEMORY = {"read", "update", "state_dict", "load_state_dict"}
PLACES = {"reward", "async reward", "callback", "engine", "generate", "sync", "reset", "step"}
switching: set[str] = set()


@pytest.mark.parametrize(("baseline", "places"), [(Zeros, MEMORY | PLACES), (halves, {"baseline"})])
def test_settings_that_user_code_leaves_behind_change_no_bit_of_a_training(
    baseline, places, tmp_path
):
    options = {"generator": Engine, "environment": Letters, "reward": (counted, awaited)}
    options |= {"estimator": Estimator(baseline=baseline), "save_every": 1, "max_steps": 2}
    options["callback"] = lambda *_: change("callback")
    ended = []
    for now in (set(), places):
        switching.clear()
        changed.clear()
        switching.update(now)
        result = letters_trained(tmp_path / str(len(now)), letter_task(counted), **options)
        ended.append(weights(result.policy.model))
    assert changed == places and torch.equal(*ended)
