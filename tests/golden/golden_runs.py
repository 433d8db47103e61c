"""The golden runs: a table of short command lines of `tokenrl`, and what makes one of them run in a tree.

Only the command line is used, so the table stays valid while modules move. Every run has a folder of its own
as working directory, and its main command writes to `run` in it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

# Two steps before and after each evaluation, and groups small enough for some of them to have equal rewards.
_TRAIN = (
    "train --task sort_digits --output-dir run --cpu --quiet --max-steps 4 --eval-every 2 "
    "--eval-generations 1 --prompts-per-step 8 "
)
_CONTROL = "control --output-dir run --quiet --max-steps 4 --eval-every 2 --eval-episodes 10 --num-envs 16 "
_SUMS = (
    "".join(f'{{"question": "{n}{9 - n}{n // 2}", "answer": "{9 - n}"}}\n' for n in range(10)) * 2
)


@dataclass(frozen=True)
class Run:
    """One golden run.

    Attributes:
        commands: Command lines of `tokenrl`, one after the other in the same folder.
        processes: Processes that torchrun starts for each command.
        files: Files that are written into the folder first, name to text.
    """

    commands: tuple[str, ...]
    processes: int = 1
    files: Mapping[str, str] = field(default_factory=dict)


RUNS: dict[str, Run] = {
    "rloo": Run(
        (
            _TRAIN + "--estimator rloo --save-every 2",
            "evaluate --task sort_digits --model run/model --num-generations 2 --k 1 2 "
            "--reference run/checkpoints/step_000002 --json evaluation.json",
        )
    ),
    "rloo_kl_in_reward": Run(
        (_TRAIN + "--estimator rloo --estimator.beta 0.05 --target-kl 0.02 --warmup-steps 2",)
    ),
    "grpo_kl": Run((_TRAIN + "--estimator grpo --estimator.beta 0.1 --num-iterations 2",)),
    "ppo_critic": Run(
        (
            _TRAIN + "--estimator ppo --num-iterations 2 --num-minibatches 2 "
            "--value-iterations 2 --save-every 2",
        )
    ),
    "dapo_refill": Run((_TRAIN + "--estimator dapo --num-generations 4 --max-refills 3",)),
    "running_mean": Run((_TRAIN + "--estimator reinforce_running_mean --reward-timeout 60",)),
    "remax_graded": Run(
        (
            _TRAIN
            + "--task vowels --estimator remax --estimator.entropy-coef 0.01 --num-generations 4",
        )
    ),
    "optimal": Run((_TRAIN + "--estimator optimal --max-steps 3 --gradient-checkpointing",)),
    "two_processes": Run((_TRAIN + "--estimator rloo --save-every 3",), processes=2),
    "two_processes_critic": Run(
        (_TRAIN + "--estimator ppo --num-minibatches 2 --max-steps 3 --micro-batch-size 8",),
        processes=2,
    ),
    "lora": Run(
        (_TRAIN + "--estimator grpo --estimator.beta 0.05 --lora-r 4 --learning-rate 0.005",)
    ),
    "data_file": Run(
        (
            _TRAIN.replace("--output-dir run", "--output-dir base") + "--max-steps 1",
            _TRAIN.replace("sort_digits", "data.jsonl") + "--model base/model --estimator dr_grpo "
            "--prompt-template '{question}>' --reward exact_match 'length(target=4)' --reward-weights 1 0.5 "
            "--eval-size 4 --max-completion-length 6 --learning-rate 0.0005 --lr-scheduler-type constant "
            "--truncate-prompts",
        ),
        files={"data.jsonl": _SUMS},
    ),
    "reward_model": Run(
        (
            "reward-model --task sort_digits --output-dir run --quiet --num-pairs 200 --eval-size 40 "
            "--batch-size 16 --max-steps 4 --eval-every 2",
            _TRAIN.replace("--output-dir run", "--output-dir policy")
            + "--max-steps 2 --reward run/model",
        )
    ),
    "sft": Run(("sft --task sort_digits --output-dir run --quiet --max-steps 4",)),
    "sft_lora": Run(
        (
            "sft --task sort_digits --output-dir run --quiet --max-steps 4 --lora-r 4 --learning-rate 0.01",
        ),
    ),
    "cartpole": Run((_CONTROL + "--save-every 2",)),
    "cartpole_critic": Run(
        (
            _CONTROL + "--estimator ppo --num-steps 64 --num-iterations 2 --num-minibatches 2 "
            "--value-network shared --normalize-observations --estimator.entropy-coef 0.01 "
            "--entropy-schedule linear --learning-rate-schedule linear",
        )
    ),
    "pendulum": Run(
        (
            _CONTROL + "--env Pendulum-v1 --estimator ppo --num-steps 64 --num-iterations 2 "
            "--num-minibatches 4 --reward-scale 0.1 --learning-rate 0.001 --estimator.gamma 0.9",
        )
    ),
}


class Failed(Exception):
    """A command of a golden run ended with another exit code than 0."""


def execute(name: str, tree: Path, folder: Path, models: Path) -> None:
    """Run the commands of one golden run with the code of a tree.

    Args:
        name: A key of `RUNS`.
        tree: The checkout whose packages run.
        folder: A new folder for what the run writes.
        models: Where this tree keeps its warm-started models; no other tree may share it.

    Raises:
        Failed: A command failed, or imported its code from elsewhere.
    """
    run = RUNS[name]
    folder.mkdir(parents=True)
    for file, text in run.files.items():
        (folder / file).write_text(text, encoding="utf-8")
    launcher = [sys.executable]
    if run.processes > 1:
        distributed = "-m torch.distributed.run --standalone --nproc_per_node"
        launcher += [*distributed.split(), str(run.processes)]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        for command in run.commands:
            words = [*launcher, str(HERE / "launch.py"), *shlex.split(command)]
            done = subprocess.run(
                words,
                cwd=folder,
                env=environment(tree, models),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            if done.returncode:
                output = (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
                raise Failed(f"exit code {done.returncode} of tokenrl {command}\n{output[-3000:]}")


def environment(tree: Path, models: Path) -> dict[str, str]:
    """Return the environment of a run: one thread, no accelerator, no network, the packages of the tree."""
    own = {
        "PYTHONPATH": str(tree),
        "GOLDEN_TREE": str(tree),
        "TOKENRL_CACHE": str(models),
        "XDG_CACHE_HOME": str(models / "xdg"),
        "HF_HOME": str(models / "hf"),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
    }
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **own, **threads}
