"""Runs command lines in forked processes that are killed at chosen moments. Started by `killing.Nursery`.

Each line of stdin asks for one process: {"argv": [...], "die_at": [FILE, N] or null, "log": PATH}. It counts
the calls of functions in each file of tokenrl, and kills itself with SIGKILL at the N-th of one file. The
answer is {"code": ..., "calls": {FILE: N}}: the exit code, -9 if it was killed, and the calls if it was not.
Forking costs no import.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter


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
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            _live(wanted, writer)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            calls = json.loads(pipe.read() or "{}")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"code": code, "calls": calls}), flush=True)


def _live(wanted: dict, writer: int) -> None:
    log = os.open(wanted["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    from tokenrl.cli import main as tokenrl

    calls: Counter[str] = Counter()
    file, last = wanted["die_at"] or ("", 0)

    def count(frame, event, _):
        if event == "call" and "/tokenrl/" in (name := frame.f_code.co_filename):
            name = name.rpartition("/tokenrl/")[2]
            calls[name] += 1
            if name == file and calls[name] == last:
                os.write(1, f"killed in {frame.f_code.co_name} of {name}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    code = 70
    try:
        code = tokenrl(wanted["argv"])
    finally:
        sys.setprofile(None)
        sys.stdout.flush()
        os.write(writer, json.dumps(calls).encode())
        os._exit(code)


if __name__ == "__main__":
    main()
