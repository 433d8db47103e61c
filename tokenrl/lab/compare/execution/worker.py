"""Makes runs one after the other, in a process that `local.LocalProcesses` starts.

Each line of stdin asks for a run, and each line of stdout says how one ended, both in JSON. The process ends
when stdin is closed, and so also at once when the process that started it is killed: the kernel closes the
pipe. Whatever the runs themselves print goes to their log files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import TextIO

from tokenrl.lab.compare.execution.one import Interrupted, run_logged
from tokenrl.lab.compare.records import PlannedRun
from tokenrl.runs.quiet import hush_libraries
from tokenrl.runs.signals import SIGNALS


def main() -> int:
    """Make runs until stdin is closed or a signal comes; return the exit code of the signal."""
    for name in SIGNALS.values():  # while a run trains, the run itself catches them and saves
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, exit_at_once)
    hush_libraries()
    wanted, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # rewards and environments must not read the orders, nor print among the answers
    os.dup2(2, 1)
    orders: SimpleQueue[str] = SimpleQueue()
    threading.Thread(target=_receive, args=(wanted, orders), daemon=True).start()
    while True:
        order = json.loads(orders.get())
        try:
            end = run_logged(PlannedRun(**order["run"]), Path(order["root"]))
        except Interrupted as error:
            return error.exit_code
        print(json.dumps(asdict(end)), file=answers, flush=True)


def _receive(wanted: TextIO, orders: SimpleQueue[str]) -> None:
    """Pass orders on, also while a run trains, so that the end of the other process is noticed at once."""
    for line in wanted:
        orders.put(line)
    os._exit(0)


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Handle a signal while no run trains: there is nothing to save."""
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
