"""Rewards under a deadline: what hangs is killed, what works comes back as it would from this process."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from refusals import refused, stopped
from tiny_models import make_policy

import tokenrl
from tokenrl.errors import Refused
from tokenrl.language.rewards.calls import TrainerState
from tokenrl.language.rewards.loading import load_reward
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.tasks.sources import TaskArguments
from tokenrl.language.tasks.task import PromptTask, find_task

COMPLETIONS = ["one", "three", "", "aaaa"]
LENGTHS = [3, 5, 0, 4]
PROMPTS = ["p0", "p1", "p2", "p3"]
IDS = [[1], [2, 3], [], [4]]

FILE = """
import asyncio, multiprocessing, os, re, subprocess, sys, threading, time

def length(completions, **_):
    return [len(text) for text in completions]

def half(completions, completion_ids, level, trainer_state, log_extra, log_metric):
    log_extra("level", level)
    log_metric("steps_done", trainer_state.global_step)
    return [None if not ids else len(ids) / 2 for ids in completion_ids]

def backtracks(completions, **_):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with open("started.part", "w") as file:
        file.write(f"{child.pid} {os.getpid()}")
    os.rename("started.part", "started")
    for text in completions:
        re.match("(a+)+$", "a" * 40 + "b")  # 2^40 ways to fail, and the interpreter held all along
    return [0.0] * len(completions)

async def awaits(completions, **_):
    await asyncio.sleep(600)

def strict(completions, **_):
    return [1 / len(text) for text in completions]

def infinite(completions, **_):
    return [0.0, 1.0, float("inf"), 0.0]

async def exits(completions, **_):
    sys.exit(0)

def leaves(completions, **_):
    os._exit(0)

def pooled(completions, **_):
    for _ in range(4):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            lengths = pool.map(len, completions)
    return lengths

def gone(completions, **_):
    os.kill(os.getpid(), 9)

def unsendable(completions, log_extra, **_):
    log_extra("lock", [threading.Lock()] * len(completions))
    return [0.0] * len(completions)

class Judge:
    def __init__(self):
        self.lock = threading.Lock()
    def __call__(self, completions, **_):
        return [float(os.getpid())] * len(completions)

judge = Judge()

class Points:
    value = 0
    def __call__(self, completions, **_):
        self.value += 1
        return [self.value] * len(completions)

def sometimes(completions, log_extra, log_metric, **_):
    log_metric("calls", 1)
    if "three" in completions or "hang" in completions:
        time.sleep(600)
    log_extra("size", [len(text) for text in completions])
    return [len(text) for text in completions]

def moody(completions, prompts, **_):
    if "the cat" in prompts:
        time.sleep(600)
    return [1.0 + i for i, _ in enumerate(completions)]

def meets(completions, trainer_state, **_):
    with open("met", "a") as file:
        file.write("x")
    while os.path.getsize("met") < 2:
        time.sleep(0.01)
    return [1.0] * len(completions)

others = meets
"""


@pytest.fixture(autouse=True)
def _worked(workplace):
    """A folder with the file."""
    (workplace / "worked.py").write_text(FILE)


def call(names, *, timeout=60.0, columns=None):
    rewards = Rewards([f"worked.py:{name}" for name in names], timeout=timeout)
    rewards.state = TrainerState(global_step=7)
    return rewards(PROMPTS, COMPLETIONS, IDS, columns or {"level": [1, 2, 3, 4]})


def test_a_call_gives_what_it_gives_without_a_deadline():
    names = ["length", "half"]
    there = call([*names, "pooled"])  # a pool ends its workers by SIGTERM
    here = call(names, timeout=None)
    np.testing.assert_array_equal(there.values[:, :2], here.values)
    assert there.values[:, 2].tolist() == here.values[:, 0].tolist() == LENGTHS
    as_of_a_task = Rewards(load_reward("worked.py:length"), timeout=60.0)
    assert as_of_a_task(PROMPTS, COMPLETIONS, IDS, {}).total.tolist() == LENGTHS
    assert there.logged == here.logged == {"steps_done": 7}
    assert there.extra == here.extra == {"level": [1, 2, 3, 4]}


def test_a_process_serves_every_call_of_its_function_and_keeps_its_own_state(monkeypatch):
    monkeypatch.syspath_prepend(os.getcwd())
    points = importlib.import_module("worked").Points()
    rewards = Rewards(["worked.py:judge", points], timeout=60.0)
    totals = [rewards(PROMPTS, COMPLETIONS, IDS, {}).values for _ in range(2)]
    # an object with a lock, made there by its name
    assert totals[0][0, 0] == totals[1][0, 0] != os.getpid()
    assert [values[0, 1] for values in totals] == [1, 2] and points.value == 0
    processes = [caller._process for caller in rewards._callers.values()]
    del rewards
    assert all(process.exitcode is not None for process in processes)  # nothing is left over


def test_a_pattern_that_backtracks_for_ever_is_killed_with_all_that_it_started(tmp_path):
    rows = [{"prompt": prompt} for prompt in PROMPTS]
    names = ("worked.py:length", "worked.py:backtracks")
    task = PromptTask("mine", rows, rows, None)
    _, rewards = find_task(TaskArguments(task=task, reward=names, reward_timeout=3))
    message = r"^Reward function backtracks did not return within 3 s \(reward_timeout=3\)"
    with stopped(message):
        rewards(PROMPTS, COMPLETIONS, IDS, {})
    wait_for(lambda: not any(map(running, started(tmp_path))))


def test_a_completion_whose_call_is_late_gets_no_reward_and_is_counted():
    names = ("worked.py:length", "worked.py:sometimes")
    rewards = Rewards(names, timeout=0.5, abstains=True)
    result = rewards(PROMPTS, COMPLETIONS, IDS, {}, locations=["a", "b", "c", "d"])
    assert result.valid.tolist() == [True, False, True, True]
    assert result.values[[0, 2, 3]].T.tolist() == [[3, 0, 4]] * 2
    assert np.isnan(result.values[1]).all() and result.total[1] == 0 and result.extra == {}
    assert result.logged["frac_rows_late"] == 0.25 and rewards.late == 1
    in_time = rewards(PROMPTS[:1], COMPLETIONS[:1], IDS[:1], {})
    assert in_time.logged["frac_rows_late"] == 0 and rewards.late == 1
    with stopped(r"strict raised ZeroDivisionError"):
        Rewards(["worked.py:strict"], timeout=5, abstains=True)(PROMPTS, COMPLETIONS, IDS, {})


@pytest.mark.slow  # each late call starts its process anew
def test_a_run_goes_on_without_the_rewards_that_are_late_and_says_how_many(said):
    rows = [{"prompt": text} for text in ("the cat", "one two", "sat on")]
    options = {"prompts_per_step": 2, "num_generations": 2, "max_steps": 1, "model": make_policy()}
    options |= {"eval_generations": 0, "max_completion_length": 2, "output_dir": "run"}
    options |= {"reward_timeout": 0.5, "on_reward_timeout": "abstain", "cpu": True}
    task = PromptTask("mine", rows[:2], rows[2:], None)
    tokenrl.train(task=task, reward=["worked.py:moody"], **options)
    metrics = json.loads(Path("run/metrics.jsonl").read_text().splitlines()[1])
    assert metrics["frac_rows_late"] == metrics["frac_rows_abstained"] == 0.5
    assert "2 completions got no reward, as it missed reward_timeout" in said()


def test_a_trainer_that_is_killed_leaves_nothing_behind(tmp_path):
    """The function holds the interpreter of its process, and has started a program of its own."""
    program = (
        "from tokenrl.language.rewards.worker import RewardProcess\nif __name__ == '__main__':\n"
    )
    program += "    worker = RewardProcess('bad', 'worked.py:backtracks', None, 600)\n"
    program += "    worker(completions=['c']).answer()\n"
    (tmp_path / "trainer.py").write_text(program)
    with subprocess.Popen([sys.executable, "trainer.py"]) as trainer:
        wait_for((tmp_path / "started").exists)
        pids = started(tmp_path)
        assert len(pids) == 2 and all(map(running, pids))
        trainer.kill()
    try:
        # its process; a program that it started ends by itself
        wait_for(lambda: not running(pids[1]))
    finally:
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


def started(folder):
    return [int(pid) for pid in (folder / "started").read_text().split()]


def wait_for(condition):
    end = time.monotonic() + 20  # the system ends and reaps processes when it gets to it
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def running(pid):
    stat = Path(f"/proc/{pid}/stat")  # a zombie has been killed, and waits for whoever reaps it
    try:
        os.kill(pid, 0)
        return not stat.exists() or stat.read_text().split()[2] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


FAULTS = {
    "strict": r"strict raised ZeroDivisionError: .*\(worked.py, line 25\)",
    "leaves": r"leaves ended the process that it ran in \(exit code 0\)",
    "unsendable": r"gave to log_extra cannot be sent back \(TypeError: .*lock",
    "exits": r"exits raised SystemExit: 0 \(worked.py, line 31\)",
    "infinite": r"infinite returned inf .* for the completion '' of the prompt 'p2'",
    "gone": r"gone ended the process that it ran in \(signal 9\)",
    "awaits": "Reward function awaits did not return within 0.5 s",
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_come_back_with_function_row_and_cause(name):
    with stopped(FAULTS[name]):
        call([name], timeout=0.5 if name == "awaits" else 60.0)


def test_processes_work_at_the_same_time():
    assert call(["meets", "others"]).values.tolist() == [[1.0, 1.0]] * 4


def test_arguments_that_are_missing_or_cannot_be_sent_are_named():
    with refused("half has a parameter 'level'"):
        call(["half"], columns={"column": [0] * 4})
    with stopped(r"length raised TypeError: cannot pickle '_thread.lock' object"):
        call(["length"], columns={"lock": [threading.Lock()] * 4})


def test_what_cannot_be_handed_over_is_refused_with_the_remedy():
    def inner(completions):
        return [0.0] * len(completions)

    for function, name in ((inner, "inner"), (lambda completions: [0.0], "reward")):
        message = rf"Reward function {name} cannot run under reward_timeout.*name it"
        with refused(message):
            Rewards(function, timeout=5.0)


class Here(RewardModel):
    """A reward model without the model: what matters is where it is called."""

    def __init__(self):
        self.__name__, self.lock = "here", threading.Lock()

    def __call__(self, prompts, completions, **_):
        return [float(os.getpid())] * len(completions)


def test_a_reward_model_stays_in_this_process():
    rewards = Rewards([Here(), "worked.py:length"], [1.0, 0.5], timeout=60.0)
    result = rewards(PROMPTS, COMPLETIONS, IDS, {})
    assert result.values.T.tolist() == [[os.getpid()] * 4, LENGTHS]
    assert result.total[1] == os.getpid() + 2.5
    assert Rewards(Here(), timeout=60.0)(PROMPTS, COMPLETIONS, IDS, {}).valid.all()


def refusal(name):
    with pytest.raises(Refused) as caught:
        Rewards(name, timeout=5.0)(PROMPTS, COMPLETIONS, IDS, {})
    return str(caught.value)


def test_a_process_that_may_have_none_of_its_own_is_told():
    with multiprocessing.get_context("fork").Pool(1) as pool:
        (text,) = pool.map(refusal, ["worked.py:length"])
    assert "daemonic processes are not allowed to have children" in text
    assert "Leave reward_timeout out" in text


PROGRAM = """
from tokenrl.keywords import arguments_of_call
from tokenrl.language.tasks.sources import DataArguments
def own(completions, **_):
    return [1.0] * len(completions)
if GUARD:
    arguments_of_call(DataArguments, None, {})  # as tokenrl.train does
    open("runs", "a").write("x")
    from tokenrl.language.rewards.rewards import Rewards
    for reward in REWARDS:
        print(Rewards(reward, timeout=60.0)(["p"], ["abc"], [[1]], {}).total)
"""


@pytest.mark.parametrize(
    ("guard", "rewards", "words"),
    [
        ("__name__ == '__main__'", "own,", r"\[1.\]"),
        ("True", "'worked.py:length', own", r"\[3.\]\s[\s\S]*needs `if __name__ == '__main__':`"),
    ],
)
def test_the_process_of_rewards_does_not_repeat_what_a_program_does(
    tmp_path, guard, rewards, words
):
    text = PROGRAM.replace("GUARD", guard).replace("REWARDS", f"({rewards})")
    (tmp_path / "program.py").write_text(text)
    done = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True)
    assert re.search(words, done.stdout + done.stderr)
    assert (tmp_path / "runs").read_text() == "x"
