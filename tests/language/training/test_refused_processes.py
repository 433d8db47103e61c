"""Two processes that were started in different ways are refused at once, and the main one alone says why.

Run as a program, this file is the launcher of two processes for each case.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = """train --task rows.jsonl --reward mine.py:share --cpu --max-steps 2 --prompts-per-step 2
--model tiny --num-generations 2 --eval-size 2 --max-completion-length 4 --threads 1
--output-dir run --quiet"""
DIFFER = {
    "check": "--check",
    "model": "--model other",
    "resume": "--resume auto",
    "overwrite": "--overwrite",
    "max_steps": "--max-steps 3",
    "estimator": "--estimator ppo",
    "generator": "--generator vllm",
}
"""By the setting that the message names, the flag that one of the processes has."""
REFUSED = {
    "checkpoint": ("--resume absent", "--resume absent", "it must be auto or a checkpoint"),
    "task": ("--task absent.jsonl", "--task absent.jsonl", "there is no such file"),
    "model": ("--model absent", "--model absent", "no such model was found"),
    "shares": ("--prompts-per-step 3", "--prompts-per-step 3", "cannot be shared equally"),
    "data": ("--task rows.jsonl", "--task others.jsonl", "differ in task"),
    "rows": ("--task here/rows.jsonl", "--task here/rows.jsonl", "differ in data"),
}
"""The flags of the main process and of the other one, and what the main one says."""


def cases() -> dict[str, tuple[str, str, str]]:
    """All cases: the flag is that of the main process, or of the other one."""
    main = {f"{name} of the main": (flag, "", name) for name, flag in DIFFER.items()}
    other = {f"{name} of the other": ("", flag, name) for name, flag in DIFFER.items()}
    return main | other | REFUSED


def rank(number: int, port: int, words: list[str], log: Path, path: str) -> None:
    """Be one of two processes."""
    from tokenrl.cli import main

    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    of_rank = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    of_rank |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ |= {name: str(value) for name, value in of_rank.items()}
    if "here" in words[-1]:  # each process has rows of its own there
        os.chdir(path)
        words[-1] = "rows.jsonl"
        words += ["--reward", "../mine.py:share"]
    sys.exit(main(words))


def launch(names: list[str]) -> None:
    """Start two processes for each case; print their exit codes and what they said."""
    import tokenrl.language.training.loop  # noqa: F401

    fork = multiprocessing.get_context("fork")
    for name in names:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes, logs = [], [Path(f"log-{number}") for number in (0, 1)]
        for number, log in enumerate(logs):
            log.unlink(missing_ok=True)
            words = [*QUICK.split(), *cases()[name][number].split()]
            processes.append(
                fork.Process(target=rank, args=(number, port, words, log, f"rank-{number}"))
            )
            processes[-1].start()
        for process in processes:
            process.join(60)
            process.kill()
        codes = [process.exitcode for process in processes]
        print(json.dumps([name, codes, [log.read_text() for log in logs]]), flush=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "mine.py").write_text(
        "def share(completions, **_): return [float(len(t)) for t in completions]\n"
    )
    letters = {"rows.jsonl": "abcdef", "others.jsonl": "abcdef", "rank-0/rows.jsonl": "abcdef"}
    for name, prompts in (letters | {"rank-1/rows.jsonl": "xbcdef"}).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(
            "".join(json.dumps({"prompt": f"{x} is"}) + "\n" for x in prompts)
        )
    return folder


@pytest.mark.slow
def test_processes_that_differ_in_anything_are_refused_at_once(place):
    """Both processes end with code 2, and the main one alone says why, in a paragraph."""
    names = [*cases()]
    words = [sys.executable, __file__, json.dumps(names)]
    paths = os.pathsep.join([os.getcwd(), *sys.path])
    settings = {"capture_output": True, "text": True, "cwd": place, "timeout": 60 + 60 * len(names)}
    done = subprocess.run(words, env=os.environ | {"PYTHONPATH": paths}, **settings)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [name for name, *_ in results] == names, done.stderr
    for name, codes, (main, other) in results:
        assert codes == [2, 2], (name, codes, main, other)
        assert cases()[name][2] in " ".join(main.split()), (name, main)
        assert "Traceback" not in main + other, (name, main, other)
        assert "tokenrl" not in other and "differ" not in other, (name, other)


if __name__ == "__main__":
    launch(json.loads(sys.argv[1]))
