"""The same command, repeated: it is killed, stopped, interrupted, and ends as if it had run once."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from signal import SIGINT, SIGKILL, SIGTERM

import pytest
from killing import TRAIN, equal, left

pytestmark = pytest.mark.slow

ARGV = [*TRAIN, "--estimator", "rloo", "--max-steps", "60"]


def start(nursery, argv):
    command = [sys.executable, "-m", "tokenrl", *argv]
    with nursery.log.open("a") as log:
        return subprocess.Popen(command, cwd=nursery.folder, env=nursery.environment, stdout=log, stderr=log)


def wait_for_steps(process, metrics, count):
    """Wait until metrics.jsonl has as many lines."""
    deadline = time.monotonic() + 200
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.01)
    raise AssertionError(f"the run has not come to line {count}")


@pytest.mark.timeout(900)
def test_a_command_that_is_repeated_until_it_is_done(nursery, tmp_path):
    run, chance = tmp_path / "run", random.Random(0)
    whole = start(nursery, [*ARGV, "--output-dir", str(tmp_path / "whole")])
    assert whole.wait(300) == 0, nursery.said
    ends = [(5, [SIGKILL], -9), (15, [SIGKILL], -9), (25, [SIGTERM], 143), (35, [SIGKILL], -9)]
    ends += [(45, [SIGINT, SIGINT], 130), (52, [SIGINT], 130)]
    for count, signals, code in ends:
        process = start(nursery, [*ARGV, "--output-dir", str(run), "--resume", "auto"])
        wait_for_steps(process, run / "metrics.jsonl", count)
        time.sleep(chance.uniform(0, 0.1))
        for number in signals:
            process.send_signal(number)
            time.sleep(0.02)
        assert process.wait(100) == code, nursery.said
    for _ in range(2):  # the second time nothing is left to do
        process = start(nursery, [*ARGV, "--output-dir", str(run), "--resume", "auto"])
        assert process.wait(300) == 0, nursery.said
        equal(left(run), left(tmp_path / "whole"), nursery)
    assert nursery.said.count("Traceback") == 0
