"""Runs of every kind that are killed at random moments, and continued, end equal to the bit."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from killing import TRAIN, check_killed_runs_end_equal

pytestmark = pytest.mark.slow

CONTROL = (
    "control --max-steps 12 --num-envs 8 --eval-episodes 8 --eval-every 4 --save-every 2 "
    "--keep best --patience 2 --quiet"
)
JUDGE = (
    "reward-model --task sort_digits --num-pairs 120 --max-steps 30 --batch-size 8 --eval-size 16"
)
SFT = (
    "sft --task sort_digits --max-steps 20 --batch-size 8 --eval-every 5 --save-every 3 "
    "--eval-size 8 --keep best --patience 2"
)
DIGITS = "--task digits.jsonl --model warm --eval-size 2"


class Kind(NamedTuple):
    """A kind of run: its command line, how often it is killed, and how many processes it has."""

    argv: str
    kills: int = 4
    processes: int = 1


KINDS = {
    "ppo cycle": Kind(
        f"{TRAIN} --estimator ppo --num-iterations 2 --num-minibatches 2 --lr-scheduler-type cosine "
        "--mixed-precision bf16"
    ),
    "refill": Kind(f"{TRAIN} --estimator dapo --max-refills 2"),
    "kl": Kind(
        f"{TRAIN} --estimator grpo --estimator.beta 0.05 --target-kl 0.5 --keep best --patience 2"
    ),
    "running mean": Kind(
        f"{TRAIN} --estimator reinforce_running_mean --micro-batch-size 3 --warmup-steps 3 "
        "--sync-every 3 --mixed-precision bf16 --optimizer sgd"
    ),
    "adapter": Kind(f"{TRAIN} --estimator remax --lora-r 4 --keep best --patience 1"),
    "teacher": Kind(
        f"{TRAIN} --estimator rloo --estimator.beta 0.5 --teacher warm --keep best --patience 2"
    ),
    "own teacher": Kind(
        f"{TRAIN} --estimator rloo_opd --teacher self --teacher-decay 0.5 --teacher-template {{prompt}}7"
    ),
    "epochs": Kind(f"{TRAIN} --estimator opo {DIGITS} --max-completion-length 8"),
    "worker": Kind(f"{TRAIN} --estimator rloo --reward-timeout 30"),
    "tracker": Kind(
        f"{TRAIN} --estimator spo {DIGITS} --max-completion-length 8 --num-generations 2 "
        "--reward-weights 0.5"
    ),
    "episodes that fail": Kind(
        f"{TRAIN} --estimator grpo --estimator.returns reward_to_go {DIGITS} --no-share-seed "
        "--environment episodes.py:Faulty --reward-timeout 1 --max-completion-length 12"
    ),
    "agent": Kind(f"{CONTROL} --env CartPole-v1 --estimator reinforce_running_mean", 3),
    "normalised": Kind(
        f"{CONTROL} --env Pendulum-v1 --max-episode-steps 30 --normalize-observations", 3
    ),
    "minibatches": Kind(f"{CONTROL} --env Acrobot-v1 --estimator ppo --max-episode-steps 50", 3),
    "reward model": Kind(
        f"{JUDGE} --eval-every 5 --save-every 3 --keep best --patience 2 --quiet", 6
    ),
    "warm start": Kind(
        f"{TRAIN} --model tiny --warm-start --warm-start-steps 20 --estimator rloo", 4
    ),
    "demonstrations": Kind(f"{SFT} --quiet"),
    "two processes, ppo": Kind(f"{TRAIN} --estimator ppo --num-iterations 2 --cpu", processes=2),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_run_that_is_killed(nursery, tmp_path, name):
    kind, seed = KINDS[name], list(KINDS).index(name)
    places = ("",)
    if kind.processes > 1:
        places = ("language/training", "language/rollout", "language/rewards", "runs")
    check_killed_runs_end_equal(
        nursery,
        tmp_path,
        kind.argv.split(),
        kind.kills,
        seed,
        processes=kind.processes,
        places=places,
    )
