"""A Ctrl-C passes through code that a user wrote; everything else that such code raises is its failure."""

import signal
import subprocess
import sys
import threading

import pytest

from tokenrl.runs.signals import GracefulStop
from tokenrl.user_code import is_interrupt, marked_interrupts, raised


def caught(act):
    with pytest.raises(BaseException) as found:
        act()
    return found.value


def interrupts_itself():
    raise KeyboardInterrupt


def is_interrupted():
    signal.raise_signal(signal.SIGINT)


def test_a_real_interrupt_is_told_from_one_that_code_raises():
    with marked_interrupts():
        assert is_interrupt(caught(is_interrupted))
        assert not is_interrupt(caught(interrupts_itself))
        assert not is_interrupt(caught(sys.exit))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert is_interrupt(caught(interrupts_itself))  # nobody can tell: so that no Ctrl-C is lost


def test_the_second_interrupt_of_a_run_is_a_real_one():
    with GracefulStop(quiet=True) as stop, marked_interrupts():
        assert not is_interrupt(caught(interrupts_itself))
        signal.raise_signal(signal.SIGTERM)
        assert is_interrupt(caught(is_interrupted)) and stop.requested == signal.SIGINT


def test_a_signal_that_the_program_itself_handles_is_one_too():
    """Programs end themselves so: `signal.signal(SIGTERM, lambda *_: sys.exit(143))`."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        assert is_interrupt(caught(lambda: signal.raise_signal(signal.SIGTERM)))
        assert not is_interrupt(caught(sys.exit))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_timeout_of_the_code_itself_is_none():
    def expire(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, expire)
    try:
        assert not is_interrupt(caught(lambda: signal.raise_signal(signal.SIGALRM)))
    finally:
        signal.signal(signal.SIGALRM, before)


def test_no_interrupt_arrives_in_another_thread():
    found = []

    def work():
        with marked_interrupts():
            found.append(is_interrupt(caught(interrupts_itself)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def test_a_program_that_is_interrupted_still_ends_as_python_ends_one():
    code = "import signal\nfrom tokenrl.user_code import marked_interrupts\n"
    code += "with marked_interrupts():\n    signal.raise_signal(signal.SIGINT)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and "KeyboardInterrupt" in done.stderr


def test_what_was_raised_is_said_with_its_line():
    said = raised(caught(interrupts_itself))
    assert said.startswith("it raised KeyboardInterrupt (test_user_code.py, line")
