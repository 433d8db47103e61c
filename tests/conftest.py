"""One thread for every test: the models are tiny, and threads on a busy machine wait for each other."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def handlers():
    """The programs catch signals to the end of their process; here the process goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
