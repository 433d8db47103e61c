"""One thread for every test, since the models are tiny; signals as a terminal has them."""

import gc
import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Undo what nohup and `&` do: below them Ctrl-C and hang-up are ignored, which many tests send."""
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection() -> None:
    """Collect no garbage while tests are found: each time all modules of torch would be looked through."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what is there by now out of later collections."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Only tests marked `drawn` draw learning curves of runs, which take longer than most of the runs."""
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr("tokenrl.runs.report.picture", lambda path, *_, **__: path.touch())
        monkeypatch.setattr("tokenrl.runs.html.svg", lambda *_: "<svg></svg>")


@pytest.fixture
def handlers():
    """The programs catch signals to the end of their process; here the process goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
