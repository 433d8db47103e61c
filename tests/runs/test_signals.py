import signal
import subprocess
import sys
import threading

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
print("saved", flush=True)
sys.exit(stop.exit_code)
"""


def run(signals):
    return subprocess.run([sys.executable, "-c", LOOP, signals], capture_output=True, text=True)


@pytest.mark.parametrize("signals, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGTERM,SIGTERM", 143)])
def test_first_signal_finishes_the_step_and_saves(signals, code):
    done = run(signals)
    assert done.returncode == code
    steps = signals.count(",") + 1
    assert done.stdout.splitlines() == [*(f"finished step {step}" for step in range(steps)), "saved"]
    assert done.stderr.strip().count("\n") == 0 and "will be finished and saved" in done.stderr


@pytest.mark.parametrize("signals", ["SIGINT,SIGINT", "SIGTERM,SIGINT"])
def test_second_interrupt_exits_at_once(signals):
    done = run(signals)
    assert done.returncode in (130, -signal.SIGINT)
    assert "KeyboardInterrupt" in done.stderr and done.stdout == "finished step 0\n"


def test_handlers_are_restored_and_other_threads_leave_them_alone():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with GracefulStop() as stop:
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert stop.requested is None and stop.exit_code == 0
    seen = []

    def work():
        with GracefulStop():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before[:1]
