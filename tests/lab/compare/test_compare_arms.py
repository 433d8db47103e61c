"""Arms: what a user writes, and which settings it becomes."""

import pytest

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.lab.compare.arms import changed_axes, read_arm, read_arms
from tokenrl.settings import arguments

SETTINGS = ("max_grad_norm", "lora_target_modules", "chat", "reward", "task", "temperature")


def estimator(text, **axes):
    return arguments(Estimator, read_arm(text, axes, SETTINGS).settings["estimator"])


@pytest.mark.parametrize("name", ["reinforce", "rloo", "grpo", "dapo", "ppo", "remax"])
def test_a_preset_keeps_all_its_axes(name):
    assert estimator(name) == Estimator.preset(name)
    assert read_arm(name, {}, SETTINGS).bias == Estimator.preset(name).bias_status


def test_changes_come_on_top_of_the_preset_and_of_what_all_arms_share():
    assert estimator("grpo,scale=none") == Estimator.preset("grpo", scale="none")
    assert estimator("rloo", aggregation="token_mean") == Estimator.preset("rloo", aggregation="token_mean")
    both = estimator("rloo,aggregation=sequence_mean", aggregation="token_mean", gamma=0.9)
    assert both == Estimator.preset("rloo", aggregation="sequence_mean", gamma=0.9)
    assert estimator("baseline=group_mean") == Estimator(baseline="group_mean")
    assert estimator("rloo, --estimator.scale = batch_std") == Estimator.preset("rloo", scale="batch_std")


def test_other_settings_are_read_as_python_writes_them():
    arm = read_arm("rloo,max_grad_norm=0.5,lora_target_modules=('q','v'),chat=true", {}, SETTINGS)
    assert arm.settings == {
        "estimator": {},
        "max_grad_norm": 0.5,
        "lora_target_modules": ("q", "v"),
        "chat": True,
    }
    assert read_arm("rloo,num-generations=4,learning-rate=1e-4", {}, SETTINGS).settings == {
        "estimator": {},
        "num_generations": 4,
        "learning_rate": 1e-4,
    }


def test_changed_axes_make_the_estimator_again():
    for name in ("grpo", "ppo", "reinforce_pp", "shrinkage"):
        assert arguments(Estimator, changed_axes(Estimator.preset(name))) == Estimator.preset(name)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["rloo"], "two or more"),
        (["rloo", "rloo"], "given twice"),
        (["rloo", "baseline=rloo"], "the same settings"),
        (["rlo", "grpo"], "Did you mean 'rloo'"),
        (["rloo,scal=none", "grpo"], "Did you mean 'scale'"),
        (["rloo,scale=non", "grpo"], "Did you mean 'none'"),
        (["rloo,x", "grpo"], "NAME=VALUE"),
        (["", "grpo"], "is empty"),
        (["rloo,seed=3", "grpo"], "sets itself"),
        (["rloo,estimator=grpo", "grpo"], "sets itself"),
        (["rloo,reward=mine.py:f", "grpo"], "what is measured"),
        (["rloo,gamma=2", "grpo"], "at most 1"),
    ],
)
def test_an_arm_that_cannot_be_used_is_refused_in_words(texts, words):
    with pytest.raises(Refused, match=words):
        read_arms(texts, {}, SETTINGS)
