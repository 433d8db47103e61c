"""Runs command lines in forked processes that get signals at chosen moments. Started by `killing.Nursery`.

Each line of stdin asks for one run: {"argv": [...], "moments": [[RANK, PLACE, N, SIGNAL], ...],
"processes": N, "log": PATH}. Each process counts the calls of functions of tokenrl, by file
("runs/session.py") and by function ("runs/session.py:record"), and sends itself SIGNAL at the N-th of one.
The answer has one entry for each process, {"code": ..., "calls": {PLACE: N}}: the exit code, or minus the
signal that killed it, and the calls if none did. Forking costs no import.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

PATIENCE = (8.0, 40.0)
"""Seconds after the first failure at which a launcher asks the other processes to end, and at which it kills
them. One that waits for the first contact with another ends when it is asked; later ones must end unasked."""


def main() -> None:
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import tokenrl.control.training
    import tokenrl.language.preferences.fit
    import tokenrl.language.training.loop
    import tokenrl.language.training.sft  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        wanted = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            wanted["port"] = str(free.getsockname()[1])
        children = [_born(wanted, rank) for rank in range(wanted["processes"])]
        codes = _codes(children)
        print(
            json.dumps([{"code": code, "calls": _calls(child)} for child, code in codes.items()]), flush=True
        )


def _born(wanted: dict[str, Any], rank: int) -> int:
    """Fork one process of a run; return its id."""
    child = os.fork()
    if child == 0:
        _live(wanted, rank)
    return child


def _codes(children: list[int]) -> dict[int, int]:
    """Wait for processes as a launcher does, which ends all once one has failed; return their codes."""
    codes: dict[int, int] = dict.fromkeys(children, 0)
    alive, late = set(children), list(zip(PATIENCE, (signal.SIGTERM, signal.SIGALRM), strict=True))
    failed = None
    while alive:
        for child in list(alive):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                alive.remove(child)
                codes[child] = os.waitstatus_to_exitcode(status)
        failed = failed or (time.monotonic() if any(codes.values()) else None)
        if failed and late and time.monotonic() - failed > late[0][0]:
            _, signum = late.pop(0)
            for child in alive:
                os.kill(child, signum)
        time.sleep(0.01)
    return codes


def _told(child: int) -> Path:
    return Path(f"calls{child}.json")


def _calls(child: int) -> dict[str, int]:
    if not _told(child).exists():
        return {}
    calls = json.loads(_told(child).read_text())
    _told(child).unlink()
    return calls


def _live(wanted: dict[str, Any], rank: int) -> None:
    told = _told(os.getpid()).resolve()
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if wanted["processes"] > 1:
        world = {"WORLD_SIZE": wanted["processes"], "LOCAL_WORLD_SIZE": wanted["processes"]}
        place = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": wanted["port"]}
        os.environ.update({name: str(value) for name, value in {**world, **place}.items()})
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from tokenrl.cli import main as tokenrl

    calls: Counter[str] = Counter()
    moments = {(place, number): signum for at, place, number, signum in wanted["moments"] if at == rank}

    def count(frame: Any, event: str, _: Any) -> None:
        if event == "call" and "/tokenrl/" in (file := frame.f_code.co_filename):
            file = file.rpartition("/tokenrl/")[2]
            for place in (file, f"{file}:{frame.f_code.co_name}"):
                calls[place] += 1
                if signum := moments.get((place, calls[place])):
                    text = (
                        f"{signal.Signals(signum).name} in {file}:{frame.f_code.co_name} of process {rank}\n"
                    )
                    os.write(1, text.encode())
                    os.kill(os.getpid(), signum)

    sys.setprofile(count)
    code = 70
    try:
        code = tokenrl(wanted["argv"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        told.write_text(json.dumps(calls))
        os._exit(code)


if __name__ == "__main__":
    main()
