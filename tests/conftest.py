"""One thread for every test, since the models are tiny; signals as a terminal has them."""

import gc
import json
import os
import signal
import sys

import pytest
from hypothesis import settings
from quick_runs import shorten

os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config) -> None:
    """Draw the same examples in every quick run, and new ones in `make test-slow` and in runs of one's own.

    Undo what nohup and `&` do: below them Ctrl-C and hang-up are ignored, which many tests send.
    """
    settings.register_profile("same", derandomize=True)
    if config.getoption("markexpr").startswith("not slow"):
        settings.load_profile("same")
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_collection() -> None:
    """Collect no garbage while tests are found: each time all modules of torch would be looked through."""
    gc.disable()


@pytest.fixture(scope="session", autouse=True)
def _shortened(request, tmp_path_factory):
    """Quick runs read, check and flush less often than slow ones; the user's own key is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("settings")))
        if request.config.getoption("markexpr").startswith("not slow"):
            shorten(patch)
        yield


def pytest_collection_finish() -> None:
    """Leave what is there by now out of later collections, and make these seldom: they took a tenth of the time."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Only tests marked `drawn` draw curves, which take longer than most of the runs."""
    if not request.node.get_closest_marker("drawn"):
        monkeypatch.setattr("tokenrl.runs.markup.svg", lambda *_: "<svg></svg>")


@pytest.fixture(autouse=True)
def _own_modules(tmp_path_factory):
    """A test's own modules and their folders are forgotten after it, as in a process of its own."""
    before, path = {*sys.modules}, [*sys.path]
    yield
    sys.path[:] = path
    folder = str(tmp_path_factory.getbasetemp())
    for name in sys.modules.keys() - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(folder):
            del sys.modules[name]


@pytest.fixture
def handlers():
    """The programs catch signals to the end of their process; here the process goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def said(capsys):
    """`said()`: what was printed on the standard output since the last look, in one line."""
    return lambda: " ".join(capsys.readouterr().out.split())


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder of the test's own, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Warm starts are kept in a folder of the test's own."""
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def refusal(capsys):
    """`refusal(line, *words)`: what a command prints as it refuses its words, without a traceback."""
    from tokenrl.cli import main

    def refusal(line, *words):
        assert main([*line.split(), *words]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    return refusal


@pytest.fixture
def short_warm_start(cache, monkeypatch):
    """Warm starts of ten steps, in a cache of the test's own."""
    from tokenrl.language.supervised import base

    fit = base.fit
    monkeypatch.setattr(
        base, "fit", lambda *args, **options: fit(*args, **options | {"max_steps": 10})
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A saved model and a data file that suits train, sft and reward-model, which `datasets` has not seen."""
    from tokenrl.language.policy.model import wrap
    from tokenrl.language.policy.saving import save_policy
    from toy_tasks import load

    folder = tmp_path_factory.mktemp("files")
    save_policy(wrap(*load("sort_digits").build(0)), folder / "model")
    row = {"answer": "1", "completion": "1", "chosen": "1", "rejected": "2"}
    lines = [json.dumps({"prompt": f"{number}>"} | row) for number in range(30)]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder
