import multiprocessing
import signal
import subprocess
import sys
import threading
import time

import pytest

from tokenrl.runs.signals import GracefulStop

LOOP = """
import os, signal, sys
from tokenrl.runs.signals import GracefulStop
signals = [getattr(signal, name) for name in sys.argv[1].split(",")]
with GracefulStop() as stop:
    for step in range(5):
        if signals:
            os.kill(os.getpid(), signals.pop(0))
        print("finished step", step, flush=True)
        if stop.requested and not signals:
            break
"""


@pytest.mark.parametrize("signals", ["SIGINT,SIGINT", "SIGTERM,SIGINT"])
def test_second_interrupt_exits_at_once(signals):
    done = subprocess.run([sys.executable, "-c", LOOP, signals], capture_output=True, text=True)
    assert done.returncode in (130, -signal.SIGINT)
    assert (
        done.stderr.count("will be finished and saved") == 1 and "KeyboardInterrupt" in done.stderr
    )
    assert done.stdout == "finished step 0\n"


def test_a_process_that_is_forked_inside_ends_by_the_signal_as_the_workers_of_a_pool_must():
    with GracefulStop(quiet=True):
        child = multiprocessing.get_context("fork").Process(
            target=time.sleep, args=(60,), daemon=True
        )
        child.start()
        child.terminate()
        child.join(20)
    assert child.exitcode == -signal.SIGTERM


def test_other_threads_leave_the_handlers_alone():
    before, handlers = signal.getsignal(signal.SIGTERM), []

    def work():
        with GracefulStop() as stop:
            handlers.append((signal.getsignal(signal.SIGTERM), stop.exit_code))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [(before, 0)]
