"""Code of a user that calls `sys.exit` ends no run in silence."""

from __future__ import annotations

import sys

import torch
from folders import read_json
from refusals import stopped
from tiny_models import letter_task, letters_trained

from tokenrl.core import Estimator


class Leaving(Exception):
    """An error whose words cannot be read."""

    def __str__(self):
        sys.exit(0)


class Memory:
    """A baseline whose state cannot be read once the reward has failed."""

    failed = False

    def read(self, keys):
        return torch.zeros(len(keys))

    def update(self, keys, rewards):
        """Remember nothing."""

    def state_dict(self):
        return sys.exit(0) if Memory.failed else {}

    def load_state_dict(self, state):
        """Continue with nothing."""


def leaving(completions, trainer_state, **_):
    Memory.failed = trainer_state.global_step == 2
    if Memory.failed:
        raise Leaving
    return [float(text.count("a")) for text in completions]


def test_sys_exit_in_the_words_of_an_error_and_in_a_state_is_a_failure(tmp_path):
    with stopped("Leaving"):
        letters_trained(tmp_path, letter_task(leaving), estimator=Estimator(baseline=Memory))
    summary = read_json(tmp_path / "summary.json")
    assert (summary["exit_reason"], summary["steps"]) == ("failed", 2)
