"""The choice of threads, decided with a clock of its own: no test measures real time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tokenrl.errors import Refused, Stopped
from tokenrl.runs import threads
from tokenrl.runs.threads import (
    FEW,
    Choice,
    ThreadArguments,
    choose_threads,
    threads_in_words,
    using_threads,
    with_threads,
)


class Machine:
    """Work that takes `seconds(threads, call)`; it keeps with how many threads each call was made."""

    def __init__(self, seconds):
        self.seconds, self.calls, self.now = seconds, [], 0.0

    def work(self):
        threads = torch.get_num_threads()
        self.now += self.seconds(threads, self.calls.count(threads))
        self.calls.append(threads)

    def choose(self, parameters=FEW, given=None):
        return choose_threads(self.work, parameters, given, clock=lambda: self.now)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    """No variable decides, and products of matrices are as fast as the clock of the test says."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "_multiply", lambda: None)


@pytest.mark.parametrize(
    ("most", "seconds", "number"),
    [
        (2, lambda n, call: 0.010 / n, 2),
        (2, lambda n, call: 0.010 / n**0.25, 1),  # faster by 1.19: the machine may become busier
        (2, lambda n, call: 0.010, 1),
        (8, lambda n, call: 0.010 / n, 8),
        (6, lambda n, call: 0.010 / n, 6),  # no power of two
        (8, lambda n, call: 0.010 / min(n, 4), 4),
        (64, lambda n, call: 0.010 if n == 1 else 1.0, 1),  # 64 processors, of which one may be used
    ],
)
def test_more_threads_are_taken_where_they_are_clearly_faster(most, seconds, number):
    with using_threads(most):
        choice = Machine(seconds).choose()
        assert torch.get_num_threads() == most
    assert (choice.number, choice.measured) == (number, True)


def test_one_long_wait_decides_for_fewer_threads():
    waits = Machine(lambda n, call: 0.010 if n == 1 else 0.2 if call == 3 else 0.005)
    with using_threads(2):
        assert waits.choose().number == 1
    assert waits.calls == [1, 2] * 4  # and ends the measurement


@pytest.mark.parametrize("disturbed", range(1, 6))
def test_a_call_that_is_disturbed_decides_nothing(disturbed):
    def seconds(quick, slow):
        return lambda n, call: (quick if n == 2 else 0.010) * (slow.get(n, 1) if call == disturbed else 1)

    with using_threads(2):
        assert Machine(seconds(0.007, {2: 1.9})).choose().number == 2
        assert Machine(seconds(0.009, {1: 30})).choose().number == 1
        assert Machine(seconds(0.007, {1: 0.5})).choose().number == 2


def test_threads_that_wait_for_each_other_are_tried_once_and_the_first_call_only_warms_up():
    slow = Machine(lambda n, call: 0.010 if n == 1 else 5.0)
    with using_threads(16):
        assert slow.choose().number == 1
    assert slow.calls == [1, 2]
    cold = Machine(lambda n, call: 0.018 if call == 0 else 0.010 / n)
    with using_threads(2):
        assert cold.choose().number == 2


def test_on_a_busy_machine_the_work_itself_is_not_tried(monkeypatch):
    busy, machine = Machine(lambda n, call: 0.010 if n == 1 else 0.2), Machine(lambda n, call: 1.0 / n)
    monkeypatch.setattr(threads, "_multiply", busy.work)
    with using_threads(2):
        choice = choose_threads(machine.work, FEW, clock=lambda: busy.now)
    assert choice == Choice(1, "measured: the processors are busy", measured=True)
    assert (busy.calls, machine.calls) == ([1, 2], [])


def test_of_long_work_two_pairs_are_enough():
    machine = Machine(lambda n, call: 0.6 / n)
    with using_threads(2):
        choice = machine.choose()
    assert choice == Choice(2, "measured: 600 ms with 1, 300 ms with 2", measured=True)
    assert machine.calls == [1, 2, 1, 2]


def test_what_decides_without_a_measurement(monkeypatch):
    machine = Machine(lambda n, call: 0.010 / n)
    with using_threads(2):
        assert machine.choose(FEW - 1) == Choice(1, "more are no use to 249,999 parameters")
        assert machine.choose(given=3) == Choice(3, "as set")
    with using_threads(1):  # by OMP_NUM_THREADS or by a call of torch.set_num_threads
        assert machine.choose() == Choice(1, "torch has no more")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with using_threads(4):
        assert machine.choose() == machine.choose(5) == Choice(4, "OMP_NUM_THREADS")
        assert machine.choose(given=2) == Choice(2, "as set")  # a run repeated from its config.json
    assert machine.calls == []


def test_several_processes_keep_what_started_them_has_set(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with using_threads(2):
        choice = choose_threads(pytest.fail, FEW)
    assert choice == Choice(2, "one of several processes")


def test_the_number_is_as_before_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(Stopped), using_threads(before + 2):
        with using_threads(None):
            assert torch.get_num_threads() == before + 2
        raise Stopped("no")
    assert torch.get_num_threads() == before

    def fails():
        raise Stopped("not finite")

    with using_threads(2), pytest.raises(Stopped):
        choose_threads(fails, FEW, clock=lambda: 0.0)
    assert torch.get_num_threads() == before


def test_the_line_and_the_settings():
    one, two = Choice(1, "measured: 3 ms with 1, 3.1 ms with 2", True), Choice(2, "as set")
    assert threads_in_words({"sampling": two, "training": two}) == "2 for sampling and training (as set)"
    line = "1 for sampling (measured: 3 ms with 1, 3.1 ms with 2), 2 for training (as set)"
    assert threads_in_words({"sampling": one, "training": two}) == line
    args = ThreadArguments()
    assert with_threads(args, {}) == args
    made = ThreadArguments(sampling_threads=1, training_threads=2)
    assert with_threads(args, {"sampling": one, "training": two}) == made


@pytest.mark.parametrize("number", [0, 1025])  # 100,000 threads end the process
def test_a_number_that_no_machine_has_is_refused(number):
    with pytest.raises(
        Refused, match=r"training_threads was given as .* at least 1 and at most 1,024, or None"
    ):
        ThreadArguments(training_threads=number)


def test_the_variable_reaches_torch():
    code = "from tokenrl.runs.threads import choose_threads; print(*choose_threads(print, 10**9))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "1 OMP_NUM_THREADS False\n", done.stderr
