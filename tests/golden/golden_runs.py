"""The golden runs: a table of short command lines of `tokenrl`, and a program that runs some of them.

    PYTHONPATH=TREE python tests/golden/golden_runs.py NAME [NAME ...]

Only the command line is used, so the table stays valid while modules move. Every run has a folder of its own,
in which its processes are forked from this one, which has imported the libraries.
"""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from pathlib import Path

# Two steps before and after each evaluation, and groups small enough for some of them to have equal rewards.
_TRAIN = (
    "train --task sort_digits --output-dir run --cpu --quiet --max-steps 4 --eval-every 2 "
    "--eval-generations 1 --prompts-per-step 8 "
)
_CONTROL = "control --output-dir run --quiet --max-steps 4 --eval-every 2 --eval-episodes 10 --num-envs 16 "
_SUMS = (
    "".join(f'{{"question": "{n}{9 - n}{n // 2}", "answer": "{9 - n}"}}\n' for n in range(10)) * 2
)
RUNS: dict[str, list[str]] = {
    "rloo": [
        f"{_TRAIN} --estimator rloo --save-every 2",
        "evaluate --task sort_digits --model run/model --num-generations 2 --k 1 2 "
        "--reference run/checkpoints/step_000002 --json evaluation.json",
    ],
    "rloo_kl_in_reward": [
        f"{_TRAIN} --estimator rloo --estimator.beta 0.05 --target-kl 0.02 --warmup-steps 2"
    ],
    "ppo_critic": [
        f"{_TRAIN} --estimator ppo --num-iterations 2 --num-minibatches 2 --value-iterations 2 --save-every 2"
    ],
    "dapo_refill": [f"{_TRAIN} --estimator dapo --num-generations 4 --max-refills 3"],
    "running_mean": [f"{_TRAIN} --estimator reinforce_running_mean --reward-timeout 60"],
    "remax_graded": [
        f"{_TRAIN} --task vowels --estimator remax --estimator.entropy-coef 0.01 --num-generations 4"
    ],
    "optimal": [f"{_TRAIN} --estimator optimal --max-steps 3 --gradient-checkpointing"],
    "two_processes_critic": [
        f"{_TRAIN} --estimator ppo --num-minibatches 2 --max-steps 3 --micro-batch-size 8"
    ],
    "lora": [
        f"{_TRAIN} --estimator grpo --estimator.beta 0.05 --lora-r 4 --learning-rate 0.005 --num-iterations 2"
    ],
    "data_file": [
        f"{_TRAIN} --output-dir base --max-steps 1",
        f"{_TRAIN} --task data.jsonl --model base/model --estimator dr_grpo "
        "--prompt-template '{question}>' --reward exact_match 'length(target=4)' --reward-weights 1 0.5 "
        "--eval-size 4 --max-completion-length 6 --learning-rate 0.0005 --lr-scheduler-type constant "
        "--truncate-prompts",
    ],
    "reward_model": [
        "reward-model --task sort_digits --output-dir run --quiet --num-pairs 200 --eval-size 40 "
        "--batch-size 16 --max-steps 4 --eval-every 2",
        f"{_TRAIN} --output-dir policy --max-steps 2 --reward run/model",
    ],
    "sft_lora": [
        "sft --task sort_digits --output-dir run --quiet --max-steps 4 --lora-r 4 --learning-rate 0.01"
    ],
    "cartpole": [f"{_CONTROL} --save-every 2"],
    "cartpole_critic": [
        f"{_CONTROL} --estimator ppo --num-steps 64 --num-iterations 2 --num-minibatches 2 "
        "--value-network shared --normalize-observations --estimator.entropy-coef 0.01 "
        "--entropy-schedule linear --learning-rate-schedule linear"
    ],
    "pendulum": [
        f"{_CONTROL} --env Pendulum-v1 --estimator ppo --num-steps 64 --num-iterations 2 "
        "--num-minibatches 4 --reward-scale 0.1 --learning-rate 0.001 --estimator.gamma 0.9"
    ],
}
"""By name, command lines of `tokenrl`, one after the other; two processes where the name says so."""


def forked(command: str, folder: Path, world: dict[str, str]) -> int:
    """Run a command line in a process of its own, whose output goes to log.txt; return its number."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= world
        from tokenrl.cli import main as tokenrl

        code = tokenrl(shlex.split(command))
    finally:
        os._exit(code)


def main() -> None:
    for library in ("transformers", "accelerate", "datasets", "peft", "gymnasium"):
        importlib.import_module(library)
    for name in sys.argv[1:]:
        Path(name).mkdir()
        Path(name, "data.jsonl").write_text(_SUMS, encoding="utf-8")
        size = "2" if name.startswith("two_processes") else "1"
        world = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": "29533"}
        world |= {"MASTER_ADDR": "127.0.0.1"}
        for command in RUNS[name]:
            ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(int(size))]
            own = [world | rank if len(ranks) > 1 else {} for rank in ranks]
            children = [forked(command, Path(name), variables) for variables in own]
            statuses = [os.waitpid(child, 0)[1] for child in children]
            if any(statuses):
                sys.exit(f"tokenrl {command} failed: {Path(name, 'log.txt').read_text()[-3000:]}")


if __name__ == "__main__":
    main()
