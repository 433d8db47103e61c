"""What a reward may not return, whatever it raises (`sys.exit` too), and async functions run together."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
import signal

import numpy as np
import pytest
import torch
from refusals import stopped
from test_rewards import COMPLETIONS, IDS, PROMPTS, length, returning

from tokenrl.language.rewards.rewards import Rewards

LINES = ["line 1", "line 2", "line 8", "line 9"]


def call(functions, weights=None):
    return Rewards(functions, weights)(PROMPTS, COMPLETIONS, IDS, {})


# ---- what it returns ----


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "nan"), (-math.inf, "-inf"), (10**400, r"10+ \(int\)"), (1.01e12, "1010000000000.0"),
        ("1.0", r"'1.0' \(str\)"), (torch.tensor([1.0]), r"tensor\(\[1.\]\) \(Tensor\)"),
        (1j, r"1j \(complex\)"), (torch.zeros((), device="meta"), r"meta.*\(Tensor\)"),
    ],
)  # fmt: skip
def test_one_bad_value_stops_the_run_and_names_its_row(value, words):
    row = r"for the completion 'xxx.*x\.\.\. of the prompt 'p3' \(line 9\); a reward is a"
    with stopped(rf"answer returned .*{words}.* {row}"):
        bad = returning([1e12, None, -1e12, value])
        Rewards([length, bad])(PROMPTS, COMPLETIONS, IDS, {}, locations=LINES)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (1.0, r"a float \(1.0\)"), (torch.tensor(2.0), "Tensor"), ("abcd", r"a str \('abcd'\)"),
        (None, r"NoneType.* Is a return missing\?"), ((x for x in [1, 2, 3, 4]), "generator"),
        (np.ones((4, 1)), r"\[1.0\] \(list\) for the completion 'one'"),
        ([], "0 rewards for 4 completions;"), ([1.0], "1 rewards for 4"), (np.ones(5), "5 rewards for 4"),
        (torch.zeros(4, device="meta"), r"a Tensor \(tensor\(..., device='meta'"),
    ],
)  # fmt: skip
def test_an_output_that_is_no_list_of_as_many_is_never_broadcast(output, words):
    with stopped(rf"answer returned .*{words}"):
        call(returning(output))


def test_a_sum_that_is_too_large_is_named():
    half = returning([0.5] * 4)
    growing = returning([None, 1.0, 10.0, 100.0])
    assert call([half, growing], [1e12, 0.0]).total.tolist() == [5e11] * 4
    message = r"the prompt 'p2' is 2e\+12, beyond 1e\+12: give smaller reward_weights"
    with stopped(message):
        call([half, growing], [2.0, 2e11])
    with stopped("the prompt 'p2' is nan"):  # inf - inf
        call([growing, growing], [1.7e308, -1.7e308])


# ---- what it raises ----


class Own(BaseException):
    """An error of the reward's own, which is none of Python's kinds."""


@dataclasses.dataclass(eq=True)
class Unhashable(Exception):
    code: int


KINDS = [SystemExit(0), RuntimeError("off"), MemoryError("gone"), Own("mine"), Unhashable(3)]


def plain(error):
    def bad(completions):
        if "" in completions:
            raise error
        return [0.0] * len(completions)

    return bad


def awaited(error):
    async def bad(completions):
        await asyncio.sleep(0)
        return plain(error)(completions)

    return bad


def in_a_task(error):
    """A task that the reward starts: in asyncio, SystemExit of one ends the loop."""

    async def bad(completions):
        return await asyncio.create_task(awaited(error)(completions))

    return bad


@pytest.mark.parametrize("error", KINDS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("make", [plain, awaited, in_a_task])
def test_what_a_reward_raises_is_its_failure(make, error):
    named = rf"Reward function bad raised {type(error).__name__}: .* \(test_reward_failures.py, line \d+\)"
    with stopped(rf"{named}\.$") as caught:
        call([length, make(error)])
    assert caught.value.__cause__ is error and caught.value.exit_code == 1


def inverse(text):
    return 1 / len(text)


def test_a_function_that_fails_is_not_called_again():
    calls = []

    def by_a_helper(completions):
        calls.append(len(completions))
        return [inverse(text) for text in completions]

    line = by_a_helper.__code__.co_firstlineno + 2
    with stopped(rf"by_a_helper raised Zero.*, line {line}\)\.$"):
        call(by_a_helper)
    assert calls == [4]


def test_a_function_that_takes_a_chat_for_text_is_told_where_the_text_is():
    def stripped(completions):
        return [float(text.strip() == "a") for text in completions]

    with stopped(r"'strip'.*; its text is completion\[0\]\[.content.\]\.$"):
        Rewards(stripped)([[{"role": "user", "content": "Say a."}]], ["a"], [[1]], {})


def test_a_real_interrupt_passes_through():
    def patient(completions):
        signal.raise_signal(signal.SIGINT)
        return [0.0] * len(completions)

    with pytest.raises(KeyboardInterrupt):
        call(patient)


# ---- async functions ----


def test_async_functions_run_together_also_inside_a_running_loop():
    """Two functions that wait for each other: run one after the other, neither would ever return."""
    loops = []

    async def attends(completions):
        loops.append(asyncio.get_running_loop())
        while len(loops) % 2:
            await asyncio.sleep(0)
        return [1.0] * len(completions)

    async def notebook():
        return call([attends, length, functools.partial(attends)]).values[1].tolist()

    assert asyncio.run(notebook()) == asyncio.run(notebook()) == [1.0, 5.0, 1.0]
    # what a function keeps between calls stays usable
    assert len({*loops}) == 1 and not loops[0].is_closed()


class Budgeted:
    """Scores each text once; one with an x is counted before its error."""

    def __init__(self):
        self.scored = {}

    def __call__(self, completions, **columns):
        rewards = []
        for text in completions:
            rewards.append(0.0 if text in self.scored else text.count("1") / 3)
            self.scored.setdefault(text, rewards[-1])
            assert "x" not in text
        return rewards

    def state_dict(self):
        return {"scored": self.scored}

    def load_state_dict(self, state):
        self.scored = state["scored"]


def test_a_reward_with_a_state_that_is_called_again_counts_each_completion_once():
    """As if the completion for which it raises an error had never been."""
    budgeted = Budgeted()
    rewards = Rewards([budgeted, length], abstains_on_error=True)
    values = rewards(PROMPTS, ["111", "11", "1x", "1"], IDS, {}).values[:, 0]
    assert values == pytest.approx([1, 2 / 3, math.nan, 1 / 3], nan_ok=True)
    assert [*budgeted.scored] == ["111", "11", "1"]


def test_a_state_that_cannot_be_read_is_told_in_a_sentence():
    budgeted = Budgeted()
    del budgeted.scored
    with stopped("The state_dict of the reward function Budgeted failed: it raised AttributeE"):
        Rewards(budgeted).state_dict()
