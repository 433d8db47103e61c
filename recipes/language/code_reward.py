"""Reward completions that are Python programs by running them, each in a process with limits.

    python recipes/language/code_reward.py                      five programs, with their rewards
    tokenrl train --task problems.jsonl --reward recipes/language/code_reward.py:passes --model MODEL --chat

The rows have a column `tests`, lines such as `assert double(2) == 4` that follow the program. A program earns
1 if it comes to the end of them within `SECONDS`; one that exits before earns 0. It runs in an empty folder,
without the variables of your environment, with limits of processor time, memory and size of files. When its
time is over, it is killed with all that it has started, and earns 0. So no completion holds up the others for
longer, and no `--reward-timeout` is needed.

The limits stop mistakes. They are no protection against programs that mean harm, which can read your files
and use the network: run those in a container or a virtual machine. Windows has none of the limits, and macOS
may have none of memory.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import Any

SECONDS = 5
"""How long a program may run."""
MEMORY, FILE = 2**30, 2**20
"""Bytes of memory, and of the largest file that it may write."""


def program_of(completion: Any) -> str:
    """Return the program in a completion: its last block of code, else all of its text."""
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    blocks = re.findall(r"```(?:python)?\n(.*?)```", text, re.DOTALL)
    return blocks[-1] if blocks else text


def limit() -> None:
    """Limit what the process may use; called in it before the program starts."""
    for name, most in (("CPU", SECONDS), ("AS", MEMORY), ("FSIZE", FILE), ("CORE", 0)):
        with contextlib.suppress(ValueError, OSError):  # a limit that this system does not have
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def succeeds(program: str) -> bool:
    """Return whether a program comes to its end, in time and without an error."""
    end = random.randrange(3, 256)  # so that no program learns the exit code that earns the reward
    program += f"\nraise SystemExit({end})"
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", program],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=limit,
            start_new_session=True,  # so that its group can be killed
        )
        try:
            return process.wait(SECONDS) == end
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started too
            process.wait()


def passes(completions: list[Any], tests: list[str], **columns: Any) -> list[float]:
    """1 for each program that passes its tests, else 0; several run at the same time."""
    programs = [
        f"{program_of(completion)}\n{lines}"
        for completion, lines in zip(completions, tests, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [float(success) for success in pool.map(succeeds, programs)]


passes.binary = True

EXAMPLES = {
    "right": "def double(x): return 2 * x",
    "a block of code": "It is:\n```python\ndef double(x):\n    return x + x\n```",
    "wrong": "def double(x): return x",
    "never ends": "while True: pass",
    "too much memory": "double = bytearray(2**40)",
}


def main() -> None:
    """Reward the examples."""
    rewards = passes(list(EXAMPLES.values()), ["assert double(2) == 4"] * len(EXAMPLES))
    for name, reward in zip(EXAMPLES, rewards, strict=True):
        print(f"{name:16}{reward:g}")


if __name__ == "__main__":
    main()
