"""Whatever a reward raises is its failure, `sys.exit` too; so are numbers that are too large."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time

import numpy as np
import pytest

from tokenrl.cli import main
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Stopped
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rewards.rewards import Rewards

COMPLETIONS = ["one", "three", "", "aaaa"]
PROMPTS = ["p0", "p1", "p2", "p3"]
IDS = [[1], [2, 3], [], [4]]


def call(functions, weights=None, **options):
    return Rewards(functions, weights, **options)(PROMPTS, COMPLETIONS, IDS, {}, step=3)


KINDS = [SystemExit(0), RuntimeError("off"), MemoryError("gone")]
WAYS = {}


def way(function):
    WAYS[function.__name__] = function
    return function


@way
def plain(error):
    def bad(completions):
        if "" in completions:
            raise error
        return [0.0] * len(completions)

    return bad


@way
def awaited(error):
    async def bad(completions):
        await asyncio.sleep(0)
        return plain(error)(completions)

    return bad


@way
def in_a_task(error):
    """A task that the reward starts: in asyncio, SystemExit and KeyboardInterrupt of one end the loop."""

    async def bad(completions):
        return await asyncio.create_task(awaited(error)(completions))

    return bad


@way
def reward_model(error):
    class Bad(RewardModel):
        def __init__(self):
            self.__name__ = "bad"

        def __call__(self, prompts, completions, **_):
            return plain(error)(completions)

    return Bad()


@way
def logged(error):
    class Number:
        def __float__(self):
            raise error

    def bad(completions, log_metric):
        log_metric("worst", Number() if "" in completions else 0.0)
        return [0.0] * len(completions)

    return bad


@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("make", WAYS.values(), ids=WAYS)
def test_what_a_reward_raises_is_its_failure(make, error):
    # In the calls on single rows, which look for the row, what is logged is not read.
    where = "rows 0 to 3 together" if make is logged else "row 2 of 4, completion ''"
    named = rf"Reward function bad raised {type(error).__name__}: .*\({where}"
    with pytest.raises(Stopped, match=named) as caught:
        call(make(error))
    assert caught.value.__cause__ is error and caught.value.exit_code == 1


def test_the_event_loop_survives_tasks_that_nobody_awaits():
    async def careless(completions):
        task = asyncio.create_task(awaited(SystemExit(3))([""]))
        await asyncio.sleep(0.01)
        assert isinstance(task.exception(), SystemExit)
        return [2.0] * len(completions)

    for _ in range(2):
        assert call(careless).total.tolist() == [2] * 4


def test_a_real_interrupt_passes_through():
    def patient(completions):
        signal.raise_signal(signal.SIGINT)
        return [0.0] * len(completions)

    with pytest.raises(KeyboardInterrupt):
        call(patient)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


FILE = """
import asyncio, sys

KINDS = [SystemExit(0), RuntimeError("no")]

def bad(completions, trainer_state, **_):
    raise KINDS[trainer_state.global_step]

async def awaited(completions, trainer_state, **_):
    raise KINDS[trainer_state.global_step]

def later(completions, trainer_state, **_):
    if trainer_state.global_step == 1:
        sys.exit(0)
    return [float(i % 3) for i in range(len(completions))]
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(FILE)
    return tmp_path


@pytest.mark.parametrize("name", ["bad", "awaited"])
def test_so_it_is_in_the_process_of_a_deadline(here, name):
    rewards = Rewards(f"bad.py:{name}", timeout=60.0)
    for step, said in enumerate(("SystemExit: 0", "RuntimeError: no")):
        with pytest.raises(
            Stopped, match=rf"{name} raised {said} \(row 0 of 4, completion 'one'\)"
        ) as caught:
            rewards(PROMPTS, COMPLETIONS, IDS, {}, step=step)
        assert "bad.py" in str(caught.value.__cause__)


def forks(completions):
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    return [float(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))] * len(completions)


def test_os_exit_of_this_process_is_a_failure_and_that_of_a_fork_is_its_own():
    def quits(completions):
        os._exit(0)

    real = os._exit
    with pytest.raises(Stopped, match=r"quits raised SystemExit: os._exit\(0\) \(row 0 of 4"):
        call(quits)
    assert call(forks).total.tolist() == [7.0] * 4
    assert os._exit is real


def test_a_run_whose_reward_exits_has_failed(here, saved, capsys):
    (here / "rows.jsonl").write_text("".join(f'{{"prompt": "a{x}"}}\n' for x in "abcdef"))
    flags = "--max-steps 3 --prompts-per-step 2 --num-generations 2 --max-completion-length 4 --eval-every 0"
    what = ["--model", str(saved()), "--task", "rows.jsonl", "--reward", "bad.py:later"]
    code = main(["train", *what, "--output-dir", "run", "--quiet", *flags.split()])
    said = capsys.readouterr().err
    assert code == 1 and "Traceback" not in said
    assert "At step 2: Reward function later raised SystemExit: 0 (row 0 of 4, completion" in said
    summary = json.loads((here / "run" / "summary.json").read_text())
    assert summary["exit_reason"] == "failed" and "later raised SystemExit" in summary["error"]


# ---- numbers that are too large ----


@pytest.mark.parametrize("value", [1e308, -1e308, 1.01e12, -(10**400), np.float32(3e38)])
def test_a_reward_that_is_too_large_is_named(value):
    def large(completions):
        return [0.0, 1e12, -1e12, value]

    said = r"large returned \S+( \(int\))? for row 3, completion .aaaa.; a reward is a number from -1e\+12 to"
    with pytest.raises(Stopped, match=said):
        call(large)


def test_a_sum_that_is_too_large_is_named():
    def half(completions):
        return [0.5] * len(completions)

    def growing(completions):
        return [None, 1.0, 10.0, 100.0]

    assert call([half, growing], [1e12, 0.0]).total.tolist() == [5e11] * 4
    said = r"row 2, completion '', is 2e\+12 = 2 x 0.5 \(half\) \+ 2e\+11 x 10 \(growing\).*reward_weights"
    with pytest.raises(Stopped, match=said):
        call([half, growing], [2.0, 2e11])
    with pytest.raises(Stopped, match="row 2, completion '', is nan"):  # inf - inf
        call([growing, growing], [1.7e308, -1.7e308])


@pytest.mark.parametrize("name", PRESETS)
def test_the_largest_rewards_have_finite_advantages(name):
    estimator = Estimator.preset(name)
    torch = pytest.importorskip("torch")
    n, width = 4096, 8
    mask = torch.ones(n, width, dtype=torch.bool)
    rewards = torch.tensor([1e12, -1e12]).repeat(n // 2)
    inputs = {"logprobs": torch.zeros(n, width), "ref_logprobs": torch.zeros(n, width)}
    inputs |= {
        "values": torch.zeros(n, width),
        "bootstrap": torch.zeros(n),
        "greedy_rewards": rewards.roll(1),
    }
    inputs |= {"score_norms": torch.ones(n, width), "baseline_value": 0.0, "max_length": width}
    advantages = estimator.advantages(rewards, mask, group_size=8, **inputs)
    assert advantages.policy.isfinite().all() and advantages.policy.abs().max() > 0


# ---- their time ----


def test_the_time_of_each_function_adds_up():
    def slow(completions):
        time.sleep(0.05)
        return [0.0] * len(completions)

    async def waits(completions):
        await asyncio.sleep(0.05)
        return [0.0] * len(completions)

    def quick(completions):
        return [0.0] * len(completions)

    rewards = Rewards([slow, waits, quick])
    for _ in range(2):
        rewards(PROMPTS, COMPLETIONS, IDS, {}, step=0)
    assert (
        rewards.seconds["slow"] > 0.1 and rewards.seconds["waits"] > 0.1 and rewards.seconds["quick"] < 0.05
    )
