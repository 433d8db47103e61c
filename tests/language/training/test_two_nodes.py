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
from pathlib import Path

import pytest
import torch
from test_processes import assert_same_metrics, environment, whole_run
from tiny_models import vowel_reward

THIS = str(Path(__file__).resolve())


def ending_its_node(completion_ids, trainer_state, **_):
    """In the program `killed` this reward kills the second node, launcher and process, in the third step."""
    if sys.argv[2:] == ["killed"] and trainer_state.global_step == 2 and os.environ["RANK"] == "1":
        for process in (os.getppid(), os.getpid()):
            os.kill(process, signal.SIGKILL)
    return vowel_reward(None, completion_ids)


def main(directory: Path) -> None:
    """What the process of a node does."""
    torch.set_num_threads(1)
    whole_run(directory / "killed", ending_its_node, resume="auto")


def two_nodes(directory: Path, program: str) -> list[tuple[int, str]]:
    """Launch two nodes and wait for both; returns the exit code and the output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    launcher = "-m torch.distributed.run --nnodes 2 --nproc_per_node 1 --rdzv-backend c10d"
    words = [sys.executable, *launcher.split(), "--rdzv-endpoint", meeting]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = []
    for first in (1, 0):
        of_node = [f"--rdzv-conf=is_host={first}", THIS, str(directory), program]
        nodes.append(subprocess.Popen([*words, *of_node], env=environment(), **pipes))
    try:
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
    finally:
        for node in nodes:
            node.terminate()
    return [(node.returncode, output) for node, output in zip(nodes, outputs, strict=True)]


@pytest.mark.slow
def test_a_node_that_is_killed_ends_the_other_and_both_continue(tmp_path):
    ended = two_nodes(tmp_path, "killed")  # a timeout here is a node that waits for ever
    assert sorted(code for code, _ in ended) == [-signal.SIGKILL, 1]
    expected = " ".join("".join(output for _, output in ended).split())
    assert re.search(
        "At step [23]: Another process of this run has ended .*/step_000002; --resume", expected
    )
    assert [code for code, _ in two_nodes(tmp_path, "resumed")] == [0, 0]
    whole_run(tmp_path / "run", ending_its_node)
    assert_same_metrics(tmp_path / "killed", tmp_path / "run")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
