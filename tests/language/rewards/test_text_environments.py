"""Environments of gymnasium's and TRL's interface: answers, random state, reuse, failures, rewards."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import signal
import time
from functools import partial

import numpy as np
import pytest
from refusals import refused, stopped

from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.isolation import Overdue, RandomStreams, call_all
from tokenrl.language.rewards.rewards import Rewards


class Draws:
    """Gymnasium's interface: draws from both global streams; a word says how a step fails."""

    def reset(self, seed=None):
        self.turn = 0
        return f"{random.random():.6f}", {"prefix": "<", "suffix": ">"}

    def step(self, text):
        self.turn += 1
        if text == "raise":
            raise ValueError("no map")
        if text == "exit":
            raise SystemExit(0)
        if text == "hang":
            # the first signal is lost, the next one is not
            with contextlib.suppress(BaseException):
                time.sleep(30)
            with contextlib.suppress(Exception):
                time.sleep(30)
        reward = np.nan if text == "nan" else np.float32(self.turn)
        observation = f"{random.random():.6f} {np.random.rand():.6f}"
        over = self.turn == 2
        return observation, reward, over, over or text == "long", {}


class Tools:
    """TRL's interface, with an async tool and an async reward."""

    observation: object = "!"

    def reset(self, secret, **_):
        self.secret, self.calls = secret, []
        return self.observation

    def guess(self, number: int) -> str:
        """Guess.

        Args:
            number: the guess.
        """
        self.calls.append(number)
        if number < 0:
            raise ValueError("below 0")
        return number == self.secret

    async def wait(self, seconds: float) -> str:
        """Wait.

        Args:
            seconds: as long as this.
        """
        first = random.random()
        await asyncio.sleep(seconds)
        return f"{first:.6f} {random.random():.6f}"

    async def get_reward(self):
        return len(self.calls)


def turns_of(*texts):
    return [{"role": "assistant", "content": text} for text in texts]


def calling(*calls):
    functions = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return {
        "content": "",
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


def contents(answer):
    return [message["content"] for message in answer.messages]


def rows(count, **columns):
    return [{"prompt": "p ", **columns} for _ in range(count)]


def test_episodes_of_gymnasium_end_with_their_rewards():
    environments = Environments(Draws)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q "}]
    first, second = environments.reset([*rows(1), {"prompt": chat}], [1, 1])
    observation = first.opening.removeprefix("p ")
    assert observation[0] + observation[-1] == "<>" and first.tools == ()
    assert second.opening == [chat[0], {"role": "user", "content": "q " + observation}]
    assert chat[1]["content"] == "q "
    (goes_on, cut) = environments.step([first, second], turns_of("go", "long"))
    assert (goes_on.ending, goes_on.reward, goes_on.messages[0]["role"]) == ("", 1.0, "user")
    assert (cut.ending, cut.messages[0]["role"]) == ("max_turns", "user")  # shown to people
    (ended,) = environments.step([first], turns_of("go"))
    assert (ended.ending, ended.reward) == ("completed", 2.0)  # terminated and truncated
    assert [answer.reward for answer in environments.finish([first, second])] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("word", "ending", "failure"),
    [
        ("raise", "error", r"raised ValueError: no map \(test_text_environments.py, line \d+\)\.$"),
        ("exit", "error", "raised SystemExit"),
        ("nan", "error", r"returned \(.*nan.*the reward is a number from -1e\+12"),
        (
            "hang",
            "timeout",
            r"did not return within 0.2 s \(test_text_environ.*raise reward_timeout",
        ),
    ],
)
def test_a_failure_ends_its_episode_alone_and_its_instance_is_not_used_again(word, ending, failure):
    environments = Environments(Draws, timeout=0.2)
    timer = signal.getitimer(signal.ITIMER_REAL)
    before = signal.getsignal(signal.SIGALRM), np.geterr(), random.getstate()
    first, second = environments.reset(rows(2), [1, 2])
    bad, good = environments.step([first, second], turns_of(word, "go"))
    assert (bad.ending, bad.messages, bad.reward, good.ending) == (ending, [], 0.0, "")
    assert bad.failure == first.failure and re.search(f"^Draws.step {failure}", bad.failure)
    assert environments.finish([first, second])[0].reward == 0.0
    third, fourth = environments.reset(rows(2), [1, 2])
    assert third.environment is second.environment
    assert fourth.environment not in (first.environment, second.environment)
    assert before == (signal.getsignal(signal.SIGALRM), np.geterr(), random.getstate())
    # also the tests have one
    assert signal.getitimer(signal.ITIMER_REAL) == pytest.approx(timer, abs=5)


@pytest.mark.parametrize(
    ("observation", "opening"),
    [("!", "p !"), (None, "p "), ([{"type": "text", "text": "?"}], "p ?")],
)
def test_tools_are_called_in_order_and_their_faults_are_answers(observation, opening):
    environments = Environments(type("Tools", (Tools,), {"observation": observation}))
    first, second = environments.reset(rows(2, secret=3), [5, 5])
    assert (first.opening, [tool.__name__ for tool in first.tools]) == (opening, ["guess", "wait"])
    turn = calling(("guess", {"number": 3}), ("wait", {"seconds": 0.01}), ("guess", {"number": -1}))
    turn["tool_calls"][0]["function"]["id"] = 7  # what a policy writes besides is left out
    wrong = calling(("wait", {"seconds": 0}), ("nope", {}), ("guess", {"x": 1}))
    several, further = environments.step([first, second], [turn, wrong])
    assert [message["role"] for message in several.messages] == ["tool"] * 3
    assert [message["name"] for message in several.messages] == ["guess", "wait", "guess"]
    right, waited, below = contents(several)
    assert (right, below) == ("True", "{'error': 'below 0'}")
    same, unknown, unexpected = contents(further)
    assert waited == same  # each has its own random state, though they wait together
    assert "no tool nope" in unknown and "unexpected keyword" in unexpected
    assert (further.ending, further.failure) == ("", "")
    assert environments.step([first], turns_of("done"))[0].ending == "completed"
    assert [answer.reward for answer in environments.finish([first, second])] == [2.0, 0.0]


def test_an_async_tool_misses_the_deadline_without_holding_others():
    environments = Environments(Tools, timeout=0.2)
    episodes = environments.reset(rows(2, secret=3), [5, 6])
    late = calling(("wait", {"seconds": 30}), ("guess", {"number": 1}))
    late, fine = environments.step(episodes, [late, calling(("wait", {"seconds": 0}))])
    assert (late.ending, late.messages, fine.ending) == ("timeout", [], "")
    assert late.failure.startswith("Tools.wait did not return within 0.2 s")
    assert episodes[0].environment.calls == []


@pytest.mark.parametrize("method", ["reset", "get_reward"])
def test_failures_of_reset_and_get_reward(method):
    environments = Environments(type("Broken", (Tools,), {method: lambda self, **_: 1 / 0}))
    (episode,) = environments.reset(rows(1, secret=1), [1])
    environments.finish([episode])
    assert episode.ending == "error" and episode.failure.startswith(f"Broken.{method} r")
    assert environments.reset(rows(1, secret=1), [1])[0].environment is not episode.environment


@pytest.mark.parametrize(
    ("kind", "method", "wrong"),
    [
        (Tools, "reset", 5),
        (Tools, "get_reward", "x"),
        (Draws, "reset", "text"),
        (Draws, "reset", (5, {})),
        (Draws, "step", ("text", 1.0)),
        (Draws, "step", ("text", 1.0, True, {})),
        (Draws, "step", None),
    ],
)
def test_a_method_that_has_never_returned_what_it_must_stops_the_run(kind, method, wrong):
    def returns_wrong(self, *text, seed=None, **_):
        return wrong

    environments = Environments(type("Wrong", (kind,), {method: returns_wrong}))
    with stopped(rf"^Wrong.{method} returned .*it must return"):
        episodes = environments.reset(rows(9, secret=1), range(9))
        environments.step(episodes, turns_of(*["go"] * 9))
        environments.finish(episodes)


def test_an_environment_cannot_change_the_rows_of_the_data():
    def pops(self, secret, **_):
        return secret.pop()

    data = rows(1, secret=["a", "b"])
    environments = Environments(type("Pops", (Tools,), {"reset": pops}))
    assert [environments.reset(data, [1])[0].opening for _ in range(2)] == ["p b", "p b"]


def no_hints(self, number):
    """Guess."""


def no_docstring(self, number: int) -> str:
    return ""


@pytest.mark.parametrize(
    ("factory", "columns", "message"),
    [
        (lambda: 1 / 0, {}, "ZeroDivisionError.*without arguments"),
        (object, {}, "has no method reset"),
        (
            type("Odd", (Draws,), {"step": lambda self, text, number: None}),
            {},
            "Odd.step cannot be called with a text alone: missing",
        ),
        (
            type("Odd", (Draws,), {"reset": property(lambda self: 1 / 0)}),
            {},
            "Odd raised ZeroDivisionError",
        ),
        ({}, {}, "environment of row 0 is None.*Available: none"),
        (type("Bare", (Tools,), {"look": no_hints}), {}, "no_hints cannot be a tool.*type hints"),
        (
            type("Bare", (Tools,), {"look": no_docstring}),
            {},
            "no_docstring cannot be a tool.*docstring",
        ),
        (
            type("Seedless", (Draws,), {"reset": lambda self: ("", {})}),
            {},
            "step cannot.*a parameter seed",
        ),
        (Tools, {}, "Tools.reset cannot take the columns of row 0.*'secret'"),
        ({"tools": Tools}, {"secret": 1}, "environment of row 0 is None.*Available: tools"),
        ({"tools": Tools}, {"secret": 1, "environment": "tool"}, "Did you mean 'tools'"),
    ],
)
def test_what_can_never_be_played_is_refused(factory, columns, message):
    with refused(message):
        Environments(factory).check_rows(rows(1, **columns))


def test_a_row_chooses_its_environment_and_rewards_are_one_more_function():
    environments = Environments({"draws": Draws, "tools": Tools})
    chosen = [{"prompt": "", "environment": name, "secret": 1} for name in ("draws", "tools")]
    objects = [episode.environment for episode in environments.reset(chosen, [1, 2])]
    assert [*map(type, objects)] == [Draws, Tools]

    def looks(environments, **_):
        return [2.0 * isinstance(environment, Tools) for environment in environments]

    columns = {"environment_rewards": [None, 0.5], "environments": objects}
    for weights, total in (([10], [0, 20.5]), ([1, 2], [0, 3])):
        rewards = Rewards([looks], weights, environments=environments)
        rewards.check_columns(["prompt"])
        result = rewards(["p", "p"], ["a", "b"], [[1], [1]], columns)
        assert rewards.names == ["looks", "environment"]
        assert result.total.tolist() == total and np.isnan(result.values[0, -1])
    assert Rewards([], environments=Environments(Tools)).names == ["Tools"]
    with refused(r"looks asks for the environments.*reward_timeout"):
        Rewards(looks, timeout=1, environments=environments)
    bare = type("Bare", (), {"reset": lambda self, **_: None})
    with refused("given, and Bare has no get_reward: give"):
        Rewards([], environments=Environments(bare))


def test_a_deadline_that_comes_as_the_call_returns_leaves_no_alarm():
    """Calls that end within microseconds of their deadline return or are overdue, and nothing later is."""
    began, alarms = time.perf_counter, []
    timer = signal.setitimer(signal.ITIMER_REAL, 0.0)  # of pytest
    previous = signal.signal(signal.SIGALRM, lambda *_: alarms.append("ours"))
    handler = signal.getsignal(signal.SIGALRM)

    def call(end):
        while began() < end:
            pass
        return "done"

    try:
        for number in range(1000):
            end = began() + 4e-4 + (number % 40 - 20) * 1e-6
            (attempt,) = call_all([(RandomStreams(0), partial(call, end))], 4e-4)
            assert attempt.output == "done" or isinstance(attempt.error, Overdue)
            assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0), number
            assert signal.getsignal(signal.SIGALRM) is handler, number
    finally:
        signal.signal(signal.SIGALRM, previous)
        signal.setitimer(signal.ITIMER_REAL, *timer)
    assert not alarms
