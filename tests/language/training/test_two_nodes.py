"""Two nodes, which are two launches of torchrun that meet on this machine, do what one process does.

Run as a program, this file is the process of a node.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_processes import ENDS, assert_same_metrics, environment, whole_run
from tiny_models import PROMPTS, apart, make_learner, make_policy, one_step, vowel_reward, weights

from tokenrl.core.estimator import Estimator
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.rollout import cat

THIS = str(Path(__file__).resolve())
STEPS, MANY = 20, [f"{prompt} {number}" for prompt in PROMPTS for number in ("one", "two", "ten")]
RUNS = {
    "rloo": ("rloo", {}),
    "grpo, two updates, KL": (Estimator.preset("grpo", beta=0.1), {"num_iterations": 2}),
    "lora": ("rloo", {"lora_r": 4}),
}


@dataclass
class Recorded:
    """Samples completions and records them by step and prompt; repeats those that are recorded already."""

    policy: Any
    rows: dict[Any, Any]

    def generate(self, prompt_ids, sampling, draws):
        keys = [(sampling.step, *ids) for ids in prompt_ids]
        if keys[0] not in self.rows:
            rollout = TransformersGenerator(self.policy).generate(prompt_ids, sampling, draws)
            scored = dict.fromkeys(("logprobs", "entropy", "score_norms", "hidden"))
            for i, key in enumerate(keys):
                self.rows[key] = replace(
                    rollout.take((rollout.prompt_index == i).nonzero()[:, 0]), **scored
                )
        groups = [self.rows[key] for key in keys]
        return cat(
            [replace(g, prompt_index=torch.full((len(g),), i)) for i, g in enumerate(groups)]
        )

    def sync(self, policy):
        pass


def change(name: str, rows: dict[Any, Any]) -> torch.Tensor:
    """How 20 steps of SGD on the recorded completions change the weights."""
    from tokenrl.language.policy.model import add_lora

    estimator, options = RUNS[name]
    policy = make_policy("llama", vocabulary=90, initializer_range=0.1)
    policy.eos_ids = ENDS
    if "KL" in name:
        policy.reference = make_policy("llama", vocabulary=90, seed=1).model.requires_grad_(False)
    if "lora_r" in options:
        add_lora(policy, r=options["lora_r"])
    learner = make_learner(
        policy, estimator, optimizer="sgd", learning_rate=0.05, max_steps=STEPS, **options
    )
    learner.generator, before = Recorded(policy, rows), weights(policy.model)
    for step in range(1, STEPS + 1):
        one_step(learner, step=step, prompts=MANY, places=[(4 * step + i) % 12 for i in range(4)])
    return weights(policy.model) - before


def ending_its_node(completion_ids, trainer_state, **_):
    """In the program `killed` this reward kills the second node, launcher and process, in the third step."""
    if sys.argv[2:] == ["killed"] and trainer_state.global_step == 2 and os.environ["RANK"] == "1":
        for process in (os.getppid(), os.getpid()):
            os.kill(process, signal.SIGKILL)
    return vowel_reward(None, completion_ids)


def main(directory: Path, program: str) -> None:
    """What the process of a node does."""
    torch.set_num_threads(1)
    if program == "whole":
        records = torch.load(directory / "records.pt", weights_only=False)
        changes = {name: change(name, rows) for name, rows in records.items()}
        torch.save(changes, directory / f"rank{os.environ['RANK']}.pt")
        whole_run(directory / "run")
    else:
        whole_run(directory / "killed", ending_its_node, resume="auto")


def two_nodes(directory: Path, program: str) -> list[tuple[int, str]]:
    """Launch two nodes and wait for both; returns the exit code and the output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
    ]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", meeting]
    where, what = (
        ([f"--rdzv-conf=is_host={first}"] for first in (1, 0)),
        [THIS, str(directory), program],
    )
    how = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "env": environment(),
    }
    nodes = [subprocess.Popen([*words, *host, *what], **how) for host in where]
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """The directory of what two nodes saved, and how one process changed the weights."""
    directory, records = tmp_path_factory.mktemp("nodes"), {name: {} for name in RUNS}
    for name, rows in records.items():
        change(name, rows)
    torch.save(records, directory / "records.pt")
    ended = two_nodes(directory, "whole")
    assert [code for code, _ in ended] == [0, 0], ended
    return directory, {name: change(name, rows) for name, rows in records.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_nodes_change_the_weights_as_one_process_does(nodes, name):
    directory, alone = nodes
    first, second = (torch.load(directory / f"rank{rank}.pt")[name] for rank in range(2))
    assert torch.equal(first, second)
    print(f"{name}: {apart(first, alone[name]):.1e} of a change of {float(alone[name].norm()):.2g}")
    assert apart(first, alone[name]) < 1e-4


@pytest.mark.slow
def test_a_run_of_two_nodes_writes_the_metrics_of_one_process(nodes, tmp_path):
    whole_run(tmp_path / "run")
    assert_same_metrics(nodes[0] / "run", tmp_path / "run")


@pytest.mark.slow
def test_a_node_that_is_killed_ends_the_other_and_both_continue(tmp_path):
    ended = two_nodes(tmp_path, "killed")  # a timeout here is a node that waits for ever
    assert sorted(code for code, _ in ended) == [-signal.SIGKILL, 1]
    told = " ".join("".join(output for _, output in ended).split())
    assert re.search(
        "At step [23]: Another process of this run has ended .*/step_000002; --resume", told
    )
    assert [code for code, _ in two_nodes(tmp_path, "resumed")] == [0, 0]
    whole_run(tmp_path / "run", ending_its_node)
    assert_same_metrics(tmp_path / "killed", tmp_path / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
