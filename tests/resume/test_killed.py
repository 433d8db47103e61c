"""Runs that are killed at 92 random moments (agents at 12, a reward model at 10) end bit-equal."""

from __future__ import annotations

import pytest
from killing import TRAIN, check_killed_runs_end_equal

pytestmark = pytest.mark.slow

CONTROL = ["control", "--max-steps", "12", "--num-envs", "8", "--eval-episodes", "8", "--quiet"]
CONTROL += ["--eval-every", "4", "--save-every", "2"]
POLICY_GRADIENT = {
    "rloo": ["--estimator", "rloo", "--warmup-steps", "3"],
    "ppo cycle": [
        *("--estimator", "ppo", "--num-iterations", "2", "--num-minibatches", "2"),
        *("--lr-scheduler-type", "cosine"),
    ],
    "refill": ["--estimator", "dapo", "--max-refills", "2"],
    "kl": [
        "--estimator",
        "grpo",
        "--estimator.beta",
        "0.05",
        "--target-kl",
        "0.5",
        "--keep",
        "best",
    ],
    "running mean": ["--estimator", "reinforce_running_mean", "--micro-batch-size", "3"],
    "adapter": ["--estimator", "remax", "--lora-r", "4", "--keep", "best"],
    "bfloat16": ["--estimator", "gspo", "--mixed-precision", "bf16"],
    "epochs": [
        *("--estimator", "opo", "--task", "digits.jsonl", "--model", "warm"),
        *("--eval-size", "2", "--max-completion-length", "8"),
    ],
    "worker": ["--estimator", "rloo", "--reward-timeout", "30"],
    "tracker": [
        *(
            "--estimator",
            "spo",
            "--task",
            "digits.jsonl",
            "--model",
            "warm",
            "--reward-weights",
            "0.5",
        ),
        *("--eval-size", "2", "--max-completion-length", "8", "--num-generations", "2"),
    ],
    "episodes that fail": [
        *(
            "--estimator",
            "grpo",
            "--estimator.returns",
            "reward_to_go",
            "--environment",
            "episodes.py:Faulty",
            "--no-share-seed",
        ),
        *("--reward-timeout", "1", "--max-completion-length", "12"),
        *("--task", "digits.jsonl", "--model", "warm", "--eval-size", "2"),
    ],
}


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_a_policy_that_is_killed_five_times(nursery, tmp_path, name):
    seed = list(POLICY_GRADIENT).index(name)
    check_killed_runs_end_equal(nursery, tmp_path, [*TRAIN, *POLICY_GRADIENT[name]], 5, seed)


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (1, ["--env", "CartPole-v1", "--estimator", "reinforce_running_mean"]),
        (2, ["--env", "CartPole-v1", "--estimator", "a2c", "--keep", "best"]),
        (3, ["--env", "Pendulum-v1", "--max-episode-steps", "30", "--normalize-observations"]),
        (4, ["--env", "Acrobot-v1", "--estimator", "ppo", "--max-episode-steps", "50"]),
    ],
)
def test_an_agent_that_is_killed(nursery, tmp_path, seed, options):
    check_killed_runs_end_equal(nursery, tmp_path, [*CONTROL, *options], 3, seed)


def test_a_reward_model_that_is_killed_ten_times(nursery, tmp_path):
    argv = [
        "reward-model",
        "--task",
        "sort_digits",
        "--num-pairs",
        "120",
        "--max-steps",
        "30",
        "--quiet",
    ]
    argv += ["--batch-size", "8", "--eval-size", "16", "--eval-every", "5", "--save-every", "3"]
    argv += ["--keep", "best"]
    check_killed_runs_end_equal(nursery, tmp_path, argv, 10, seed=5)


def test_a_supervised_training_that_is_killed_five_times(nursery, tmp_path):
    argv = ["sft", "--task", "sort_digits", "--max-steps", "20", "--batch-size", "8", "--quiet"]
    argv += ["--eval-every", "5", "--save-every", "3", "--eval-size", "8"]
    check_killed_runs_end_equal(nursery, tmp_path, argv, 5, seed=6)


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (7, ["--estimator", "rloo", "--micro-batch-size", "3"]),
        (8, ["--estimator", "ppo", "--num-iterations", "2"]),
    ],
)
def test_one_of_two_processes_that_is_killed_five_times(nursery, tmp_path, seed, options):
    places = ("language/training", "language/rollout", "language/rewards", "runs")
    argv = [*TRAIN, *options, "--cpu"]
    check_killed_runs_end_equal(nursery, tmp_path, argv, 5, seed, processes=2, places=places)


def test_a_run_of_two_processes_is_not_continued_by_one(nursery, tmp_path):
    argv = [
        *TRAIN,
        "--estimator",
        "rloo",
        "--cpu",
        "--max-steps",
        "2",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert [one["code"] for one in nursery.run_all(argv, processes=2)] == [0, 0], nursery.said
    assert nursery.run([*argv, "--resume", "auto"]) == 2
    assert "processes: 2, now 1" in nursery.said
    assert [one["code"] for one in nursery.run_all([*argv, "--resume", "auto"], processes=2)] == [
        0,
        0,
    ]
