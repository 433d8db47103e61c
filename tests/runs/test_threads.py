"""The rule for the number of threads, the block that sets it, and how long threads wait awake."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from refusals import refused

import tokenrl
from tokenrl.errors import Stopped
from tokenrl.runs.threads import alone, choose_threads, using_threads


@pytest.mark.parametrize(
    ("parameters", "threads", "variable", "number", "reason"),
    [
        (10**9, 3, "2", 3, "as set"),
        (10, None, "2", 2, "OMP_NUM_THREADS"),
        (9_999_999, None, None, 1, "fewer than 10 M"),
        (10_000_000, None, None, 2, "as many as"),
    ],
)
def test_a_setting_comes_first_then_the_variable_then_the_size(
    monkeypatch, parameters, threads, variable, number, reason
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with using_threads(2):
        chosen, words = choose_threads(parameters, threads)
    assert chosen == number and reason in words


def test_a_block_has_its_threads_and_those_after_it_have_theirs():
    before = torch.get_num_threads()
    with pytest.raises(Stopped), using_threads(before + 2):
        with using_threads(None):
            assert torch.get_num_threads() == before + 2
        raise Stopped("an error")
    assert torch.get_num_threads() == before


SPIN = "GOMP_SPINCOUNT"


@pytest.mark.parametrize(("variables", "count"), [({}, "10000"), ({SPIN: "7"}, "7")])
def test_waiting_threads_spin_briefly_unless_the_user_says_otherwise(variables, count):
    names = (SPIN, "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    program = f"import os, tokenrl; print(os.environ.get({SPIN!r}))"
    argv = [sys.executable, "-c", program]
    done = subprocess.run(argv, env=clean | variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == count


RUNS = {
    "train": partial(tokenrl.train, task="vowels", cpu=True, quiet=True),
    "control": partial(tokenrl.train_agent, env="bandit", quiet=True),
    "sft": partial(tokenrl.sft, task="vowels", quiet=True),
    "reward-model": partial(tokenrl.train_reward_model, task="vowels", quiet=True),
}


@pytest.mark.parametrize("kind", RUNS)
def test_no_other_thread_of_the_process_begins_a_run_while_one_is_going_on(kind, workplace):
    with alone(), ThreadPoolExecutor(1) as pool:
        with refused("another thread of this process"):
            pool.submit(RUNS[kind]).result()
        with alone(), using_threads(1):  # this thread may, as a callback that evaluates
            pool.shutdown()
    assert not (workplace / "runs").exists()
