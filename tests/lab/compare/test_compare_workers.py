"""Runs of a comparison in their processes: killed, stopped and broken, they end as if nothing had been."""

from __future__ import annotations

import signal
import time

import psutil
import pytest
from grid_of_runs import control, found, grid, language, said, start, wait_for_lines

from tokenrl.lab.compare.execution.executing import execute
from tokenrl.lab.compare.execution.local import LocalProcesses
from tokenrl.lab.compare.execution.one import run_one
from tokenrl.runs.console import Console

pytestmark = pytest.mark.slow
STEPS = 30


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What the runs compute one after the other, in this process."""
    root = tmp_path_factory.mktemp("one_by_one")
    for run in grid(STEPS):
        assert run_one(run, root).state == "finished"
    files = found(root)
    assert len(files) == 10  # metrics and weights
    return files


def processes_of(process):
    return [child for child in psutil.Process(process.pid).children() if child.is_running()]


def ended(processes, seconds):
    """Whether processes end within some seconds; whoever adopts them may take long to forget them."""
    deadline = time.monotonic() + seconds
    while any(map(lives, processes)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def lives(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_side_by_side_the_runs_compute_what_each_computes_alone(expected, tmp_path):
    root = tmp_path / "grid"
    process = start(root, steps=STEPS)
    wait_for_lines(root, 2, process)
    assert len(processes_of(process)) == 2
    assert process.wait(200) == 0
    assert found(root) == expected
    assert "run 5/5" in said(root).read_text()
    assert list(root.rglob("*.log")) == []  # nothing was printed


def test_a_killed_process_loses_nothing(expected, tmp_path):
    root = tmp_path / "grid"
    process = start(root, steps=STEPS)
    wait_for_lines(root, 8, process)
    victim, other = processes_of(process)
    victim.send_signal(signal.SIGKILL)
    time.sleep(1)
    assert other.is_running()
    assert process.wait(200) == 0
    assert found(root) == expected
    assert "its process was ended by SIGKILL; if the memory" in said(root).read_text()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_and_started_again_the_runs_end_the_same(expected, tmp_path, number):
    root = tmp_path / "grid"
    process = start(root, steps=STEPS)
    wait_for_lines(root, 8, process)
    children = processes_of(process)
    process.send_signal(number)
    code = process.wait(60)
    assert code == (-9 if number == signal.SIGKILL else 128 + number)
    assert ended(children, 1)  # at once, so that no directory stays locked
    assert found(root) != expected
    if number != signal.SIGKILL:
        assert (
            f"{number.name}: 0 of 5 runs are finished, and those under way were saved."
            in said(root).read_text()
        )
        assert list(root.glob("runs/*/*/*/summary.json"))  # the session ended in order
    assert start(root, steps=STEPS).wait(200) == 0
    assert found(root) == expected


def test_ctrl_c_in_a_terminal_reaches_all_processes_and_they_save(expected, tmp_path):
    root = tmp_path / "grid"
    process = start(root, steps=STEPS)
    wait_for_lines(root, 8, process)
    for one in [*processes_of(process), process]:
        one.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "Traceback" not in said(root).read_text()
    assert start(root, steps=STEPS).wait(200) == 0
    assert found(root) == expected


def test_a_run_whose_process_dies_twice_counts_as_failed(tmp_path):
    (tmp_path / "deadly.py").write_text(
        "import os\ndef reward(prompts, completions, **_):\n    print('dying')\n    os.kill(os.getpid(), 9)\n"
    )
    deadly = language("rloo", reward=str(tmp_path / "deadly.py") + ":reward")
    runs = [deadly, language("batch_mean"), control(), control(seed=1)]
    ends = execute(runs, tmp_path, workers=2, console=Console(quiet=True))
    assert [ends[run.path].state for run in runs] == ["failed", "finished", "finished", "finished"]
    assert ends[deadly.path].reason.startswith("Twice its process was ended by SIGKILL")


def test_what_runs_print_goes_to_a_file_and_an_error_is_told_in_words(tmp_path, capfd):
    (tmp_path / "wrong.py").write_text(
        "import sys\ndef reward(prompts, completions, **_):\n    print('hello')\n    sys.stdin.read()\n"
        "    raise KeyError('nothing')\n"
    )
    run = language(reward=str(tmp_path / "wrong.py") + ":reward")
    ends = execute([run], tmp_path, workers=1, console=Console(quiet=True))
    assert ends[run.path].state == "failed" and "KeyError: 'nothing'" in ends[run.path].reason
    assert "hello" in (tmp_path / f"{run.path}.log").read_text()
    printed = capfd.readouterr()
    assert "hello" not in printed.out + printed.err


def test_a_process_is_used_again(tmp_path):
    places = LocalProcesses(tmp_path, 1)
    try:
        pids = set()
        for run in (control(), control(seed=1)):
            places.start(run)
            pids |= {process.pid for process in places._running}
            ends = []
            while not ends:
                ends = places.wait(60)
            assert ends[0].state == "finished"
    finally:
        places.close()
    assert len(pids) == 1
