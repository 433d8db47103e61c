"""Runs that are killed at 50 random moments (of control and of a reward model 10 each) end bit-equal."""

from __future__ import annotations

import json

import pytest
from killing import Nursery, kill_and_continue

pytestmark = pytest.mark.slow

REWARD = """
def sorted_digits(prompts, completions, **_):
    return [sum(a <= b for a, b in zip(c, c[1:])) / 6 + len(set(c)) / 60 for c in completions]
"""
TRAIN = [
    *("train", "--task", "sort_digits", "--reward", "rewards.py:sorted_digits", "--quiet"),
    *("--max-steps", "9", "--prompts-per-step", "4", "--num-generations", "4", "--eval-size", "8"),
    *("--eval-every", "3", "--save-every", "2", "--log-completions", "2", "--learning-rate", "1e-3"),
]
CONTROL = ["control", "--max-steps", "12", "--num-envs", "8", "--eval-episodes", "8", "--quiet"]
CONTROL += ["--eval-every", "4", "--save-every", "2"]
POLICY_GRADIENT = {
    "rloo": ["--estimator", "rloo", "--diagnostics-every", "2", "--warmup-steps", "3"],
    "ppo cycle": [
        *("--estimator", "ppo", "--num-iterations", "2", "--num-minibatches", "2"),
        *("--lr-scheduler-type", "cosine"),
    ],
    "refill": ["--estimator", "dapo", "--max-refills", "2"],
    "kl": ["--estimator", "grpo", "--estimator.beta", "0.05", "--target-kl", "0.5"],
    "running mean": ["--estimator", "reinforce_running_mean", "--micro-batch-size", "3"],
    "adapter": ["--estimator", "remax", "--lora-r", "4"],
    "bfloat16": ["--estimator", "gspo", "--mixed-precision", "bf16"],
    "difficulty": ["--estimator", "rloo", "--filter-difficulty", "0.1", "0.9", "--filter-samples", "2"],
    "epochs": [
        "--estimator",
        "opo",
        "--task",
        "digits.jsonl",
        "--model",
        "warm",
        "--eval-size",
        "2",
        "--max-completion-length",
        "8",
    ],
    "worker": ["--estimator", "rloo", "--reward-timeout", "30"],
}


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nursery")
    (folder / "rewards.py").write_text(REWARD)
    rows = [json.dumps({"prompt": f"{n * 98765 % 999999:06d}>"}) for n in range(1, 11)]
    (folder / "digits.jsonl").write_text("\n".join(rows))
    found = Nursery(folder)
    warm = ["sft", "--task", "sort_digits", "--max-steps", "1", "--output-dir", "warm", "--quiet"]
    assert found.run(warm)[0] == 0  # the task's model is made once
    yield found
    found.close()


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_a_policy_that_is_killed_five_times(nursery, tmp_path, name):
    seed = list(POLICY_GRADIENT).index(name)
    kill_and_continue(nursery, tmp_path, [*TRAIN, *POLICY_GRADIENT[name]], 5, seed)


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (1, ["--env", "CartPole-v1", "--estimator", "reinforce_running_mean"]),
        (2, ["--env", "CartPole-v1", "--estimator", "a2c", "--num-steps", "16"]),
        (3, ["--env", "Pendulum-v1", "--max-episode-steps", "30", "--normalize-observations"]),
        (4, ["--env", "Acrobot-v1", "--estimator", "ppo", "--num-steps", "16", "--max-episode-steps", "50"]),
    ],
)
def test_an_agent_that_is_killed(nursery, tmp_path, seed, options):
    kill_and_continue(nursery, tmp_path, [*CONTROL, *options], 3, seed)


def test_a_reward_model_that_is_killed_ten_times(nursery, tmp_path):
    argv = ["reward-model", "--task", "sort_digits", "--num-pairs", "120", "--max-steps", "30", "--quiet"]
    argv += ["--batch-size", "8", "--eval-size", "16", "--eval-every", "5", "--save-every", "3"]
    kill_and_continue(nursery, tmp_path, argv, 10, seed=5)


def test_a_supervised_training_that_is_killed_five_times(nursery, tmp_path):
    argv = ["sft", "--task", "sort_digits", "--max-steps", "20", "--batch-size", "8", "--quiet"]
    argv += ["--eval-every", "5", "--save-every", "3", "--eval-size", "8"]
    kill_and_continue(nursery, tmp_path, argv, 5, seed=6)
