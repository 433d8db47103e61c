"""Plays episodes of several turns in environments that answer text with text, or that offer tools.

Two interfaces are understood. Gymnasium's on text: `reset(seed=...) -> (text, info)` and
`step(text) -> (text, reward, terminated, truncated, info)`, where GEM's `info["prefix"]` and `info["suffix"]`
stand around an observation. And TRL's: `reset(**row)` returns None or text, the other public methods are
tools, and `get_reward()` rewards the whole episode. An object with `step`, whose `reset` has a parameter
`seed`, has gymnasium's interface. Methods may be async; those of all rows are then awaited together.

Environments draw from the global streams of `random` and `numpy.random`, so each episode has a state of them
of its own, which depends on its seed alone. Otherwise the order of a batch would change its episodes, and a
run could not be continued exactly.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import random
import signal
import time
import traceback
import types
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Refused, TokenrlError, describe, location, suggest, with_places, written
from tokenrl.language.rewards.calls import Attempt, Overdue, await_all, restored_settings, reward_number
from tokenrl.settings import LARGEST_REWARD, check_choice, check_number, shown

ENDINGS = ("completed", "max_turns", "max_tokens", "context_overflow", "parse_error", "error", "timeout")
"""Why an episode ended. `completed`: the environment ended it, or the policy called no tool."""

Message = dict[str, Any]
ROOM = Path(__file__).parent


class Answer(NamedTuple):
    """What an environment answers to a turn.

    Attributes:
        messages: what the policy reads next, each with a role ("user" or "tool") and content; empty if the
            episode is over.
        reward: the reward of the turn that was answered.
        ending: empty if the episode goes on, else a name of `ENDINGS`.
        failure: with the endings `error` and `timeout` one sentence that names class, method, problem, line.
    """

    messages: list[Message]
    reward: float = 0.0
    ending: str = ""
    failure: str = ""


class Streams:
    """An episode's own state of the global streams of `random` and `numpy.random`; active in a `with`."""

    def __init__(self, seed: int) -> None:
        self._own = random.Random(seed).getstate(), np.random.RandomState(seed).get_state()

    def __enter__(self) -> None:
        self._outside = self._exchange(self._own)

    def __exit__(self, *_: object) -> None:
        self._own = self._exchange(self._outside)

    def _exchange(self, states: tuple[Any, Any]) -> tuple[Any, Any]:
        before = random.getstate(), np.random.get_state()
        random.setstate(states[0])
        np.random.set_state(states[1])
        return before


@dataclass(eq=False)
class Episode:
    """The episode of one row, under way or over.

    Attributes:
        environment: the user's object; None if it could not be made.
        opening: the prompt of the row, with the observation of reset appended to its last user message.
        tools: the tools of the environment, for the chat template; empty with gymnasium's interface.
        ending: empty while the episode goes on, else why it failed, a name of `ENDINGS`.
        failure: a sentence that says what failed; empty if nothing did.
        rewarded: whether the environment gives rewards at all.
        name: the name of its factory; None if there is only one.
        streams: its random state.
    """

    environment: Any
    opening: str | list[Message]
    tools: Sequence[Callable[..., Any]] = ()
    ending: str = ""
    failure: str = ""
    rewarded: bool = True
    name: str | None = None
    streams: Streams = field(default_factory=lambda: Streams(0), repr=False)


class Environments:
    """Environments of one factory or several, which are made once and used again.

    An instance is free again at the first `reset` after its episode was finished, so reward functions may
    look at it until then. One that failed or missed the deadline is not used again.

    Attributes:
        factories: the factories by name; a single one has the name None.
        name: the name of the environment's reward: that of its class, or "environment" if there are several.
        rewarded: whether an environment of them gives rewards.
    """

    def __init__(
        self,
        factory: Any,
        *,
        max_turns: int = 10,
        share_seed: bool = True,
        malformed: str = "end",
        timeout: float | None = None,
    ) -> None:
        """Make one instance of each environment, and check it.

        Args:
            factory: a class or function without arguments that returns an environment, or a dictionary of
                them, from which the column `environment` of a row chooses.
            max_turns: the most turns of the policy in an episode.
            share_seed: whether the episodes of a prompt's group are reset with the same seed.
            malformed: a tool call that cannot be parsed ends the episode ("end"), or is answered with the
                error ("observe").
            timeout: seconds that one call of an environment may take; None: as long as it likes.

        Raises:
            Refused: an environment cannot be made, has no `reset` or has a tool without type hints or
                docstring; a setting is out of its bounds; a deadline is impossible here.
        """
        check_number("max_turns", max_turns, int, at_least=1)
        check_choice("malformed", malformed, ("end", "observe"))
        if timeout is not None:
            check_number("reward_timeout", timeout, above=0)
        self.max_turns, self.share_seed = max_turns, share_seed
        self.malformed, self.timeout = malformed, timeout
        several = isinstance(factory, Mapping)
        self.factories: dict[str | None, Callable[[], Any]] = dict(factory) if several else {None: factory}
        if not self.factories:
            raise Refused("The dictionary of environments is empty: give a factory for each name.")
        self._free: dict[str | None, list[Any]] = {name: [] for name in self.factories}
        self._finished: list[Episode] = []
        self._first = {name: self._checked(name) for name in self.factories}
        names = [type(instance).__name__ for instance in self._first.values()]
        self.name = names[0] if len(names) == 1 else "environment"
        self.rewarded = any(map(_gives_rewards, self._first.values()))

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Check that each row names an environment, the `reset` of which takes its columns.

        Raises:
            Refused: a row names none, or its columns do not fit.
        """
        for where, row in with_places(rows):
            name = self._name(row)
            if name not in self._first:
                problem = f"The column environment of {where} is {name!r}, which names no environment"
                raise Refused(f"{problem}.{suggest(str(name), map(str, self._first))}")
            try:
                inspect.signature(self._first[name].reset).bind(**self._options(name, row, 0))
            except TypeError as error:
                reset = f"{type(self._first[name]).__name__}.reset"
                problem = f"{reset} cannot be called with the columns of {where}: {describe(error)}"
                raise Refused(f"{problem}. Give it parameters for those it needs, and **kwargs.") from error

    def reset(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Episode]:
        """Begin an episode for each of N rows.

        Args:
            rows: N rows with their columns, `prompt` among them unless the environments write it.
            seeds: N integers, of which 31 bits are used; they decide all that an environment draws.

        Raises:
            Refused: as in `check_rows`.
        """
        self.check_rows(rows)
        while self._finished:
            episode = self._finished.pop()
            self._free[episode.name].append(episode.environment)
        episodes, calls = [], []
        for row, seed in zip(rows, seeds, strict=True):
            short = int(seed) % 2**31  # numpy takes 32 bits
            name = self._name(row)
            episode = Episode(None, row.get("prompt", ""), name=name, streams=Streams(short))
            episodes.append(episode)
            instance, error, _ = self._instance(name)
            if error is not None:
                self._fail(episode, _named(self.factories[name]), error)
                continue
            episode.environment, episode.tools = instance, _tools(instance)
            episode.rewarded = _gives_rewards(instance)
            calls.append((episode, partial(instance.reset, **self._options(name, row, short))))
        for (episode, _), attempt in zip(calls, self._call(calls), strict=True):
            self._open(episode, attempt)
        return episodes

    def step(self, episodes: Sequence[Episode], messages: Sequence[Message]) -> list[Answer]:
        """Answer one turn of the policy in each of N episodes.

        Args:
            episodes: N episodes that go on.
            messages: N messages of the assistant with `content`, and with `tool_calls` or `malformed`, the
                reason why a call cannot be parsed.
        """
        turns = list(zip(episodes, messages, strict=True))
        stepped = [turn for turn in turns if _is_gymnasium(turn[0].environment)]
        steps = [(episode, partial(episode.environment.step, turn["content"])) for episode, turn in stepped]
        attempts = zip(steps, self._call(steps), strict=True)
        answers = {episode: self._stepped(episode, attempt) for (episode, _), attempt in attempts}
        answers |= self._tool_answers([turn for turn in turns if turn[0] not in answers])
        return [answers[episode] for episode in episodes]

    def finish(self, episodes: Sequence[Episode]) -> list[Answer]:
        """End N episodes: return what `get_reward` says of those that did not fail; call it once for each.

        The reward is 0 with gymnasium's interface, and where there is no `get_reward`.
        """
        live = [episode for episode in episodes if not episode.failure]
        self._finished += live
        calls = [
            (e, e.environment.get_reward) for e in live if e.rewarded and not _is_gymnasium(e.environment)
        ]
        answers = {episode: Answer([]) for episode in episodes}
        for (episode, _), attempt in zip(calls, self._call(calls), strict=True):
            call = f"{type(episode.environment).__name__}.get_reward"
            failed = attempt.error and self._fail(episode, call, attempt.error)
            answers[episode] = failed or self._rewarded(episode, call, attempt.output)
        self._finished = [episode for episode in self._finished if not episode.failure]
        return [answers[episode] for episode in episodes]

    def _name(self, row: Mapping[str, Any]) -> str | None:
        return None if None in self.factories else row.get("environment")

    def _options(self, name: str | None, row: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Return the arguments of `reset`: a seed, or the columns of the row but the one that chooses."""
        if _is_gymnasium(self._first[name]):
            return {"seed": seed}
        return {key: value for key, value in row.items() if key != "environment" or name is None}

    def _instance(self, name: str | None) -> Attempt:
        """Return a free instance of an environment, else a new one."""
        if self._free[name]:
            return Attempt(self._free[name].pop(), None, 0.0)
        return self._call([(Episode(None, ""), self.factories[name])])[0]

    def _checked(self, name: str | None) -> Any:
        """Return the first instance of an environment, which is free then."""
        instance, error, _ = self._instance(name)
        if error is not None:
            problem = self._fail(Episode(None, ""), _named(self.factories[name]), error).failure
            raise Refused(f"{problem} An environment is made by a class or function without arguments.")
        kind = type(instance).__name__
        if not callable(getattr(instance, "reset", None)):
            raise Refused(
                f"The environment {kind} has no method reset: give it gymnasium's reset(seed=...) and "
                "step(text), or reset(**row) and methods that are tools."
            )
        for tool in _tools(instance):
            from transformers.utils import get_json_schema

            try:
                get_json_schema(tool)
            except Exception as fault:
                raise Refused(
                    f"{kind}.{tool.__name__} cannot be a tool ({describe(fault)}): give it type hints and a "
                    "docstring with a line for each argument below `Args:`, or a name with _ in front."
                ) from fault
        self._free[name].append(instance)
        return instance

    def _call(self, calls: Sequence[tuple[Episode, Callable[[], Any]]]) -> list[Attempt]:
        """Make one call for each of several episodes, in their random states; await async ones together."""
        with restored_settings():
            attempts = [self._attempt(episode.streams, call) for episode, call in calls]
            waiting = [i for i, attempt in enumerate(attempts) if inspect.isawaitable(attempt.output)]
            if waiting:
                driven = [_driven(attempts[i].output, calls[i][0].streams) for i in waiting]
                for i, attempt in zip(waiting, await_all(driven, self.timeout), strict=True):
                    attempts[i] = attempt
        return attempts

    def _attempt(self, streams: Streams, call: Callable[[], Any]) -> Attempt:
        try:
            with streams, deadline(self.timeout):
                return Attempt(call(), None, 0.0)
        except (KeyboardInterrupt, TokenrlError):  # the user's own; a deadline that is impossible
            raise
        except BaseException as error:
            return Attempt(None, error, 0.0)

    def _fail(self, episode: Episode, call: str, problem: BaseException | str) -> Answer:
        """End an episode, whose environment is not used again: a call raised something, or returned it."""
        if isinstance(problem, Overdue):
            end = f"did not return within {self.timeout:g} s{_line(problem)}"
            episode.failure = f"{call} {end}: make it faster, or raise reward_timeout."
        elif isinstance(problem, BaseException):
            episode.failure = f"{call} raised {describe(problem)}{_line(problem)}."
        else:
            episode.failure = f"{call} returned {problem}."
        episode.ending = "timeout" if isinstance(problem, Overdue) else "error"
        return Answer([], 0.0, episode.ending, episode.failure)

    def _open(self, episode: Episode, attempt: Attempt) -> None:
        """Append what `reset` returned to the prompt."""
        call = f"{type(episode.environment).__name__}.reset"
        output = attempt.output
        if attempt.error is not None:
            self._fail(episode, call, attempt.error)
            return
        try:
            if _is_gymnasium(episode.environment):
                output = _observation(*output)
            if isinstance(output, list):
                output = "".join(block["text"] for block in output)
            episode.opening = _appended(episode.opening, "" if output is None else output)
        except (TypeError, ValueError, LookupError, AttributeError):
            text = "(text, info)" if _is_gymnasium(episode.environment) else "None, text or blocks of text"
            self._fail(episode, call, f"{shown(output)}; it must return {text}")

    def _stepped(self, episode: Episode, attempt: Attempt) -> Answer:
        """Return the answer of `step` in gymnasium's interface."""
        call, output = f"{type(episode.environment).__name__}.step", attempt.output
        if attempt.error is not None:
            return self._fail(episode, call, attempt.error)
        try:
            observation, reward, terminated, truncated, info = output
            text = _observation(observation, info)
            ending = "completed" if terminated else "max_turns" if truncated else ""
        except (TypeError, ValueError, AttributeError):
            shape = "(text, reward, terminated, truncated, info)"
            return self._fail(episode, call, f"{shown(output)}; it must return {shape}")
        answer = self._rewarded(episode, call, reward)
        messages = [] if ending else [{"role": "user", "content": text}]
        return answer if answer.failure else Answer(messages, answer.reward, ending)

    def _rewarded(self, episode: Episode, call: str, reward: Any) -> Answer:
        number = reward_number(reward)
        if number is None:
            bounds = f"a reward is a number from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
            return self._fail(
                episode, call, f"the reward {shown(reward)} ({type(reward).__name__}); {bounds}"
            )
        return Answer([], number)

    def _tool_answers(self, turns: Sequence[tuple[Episode, Message]]) -> dict[Episode, Answer]:
        """Call the tools of N turns: the first call of each turn, then the second of each, and so on."""
        answers: dict[Episode, Answer] = {}
        for episode, turn in turns:
            if reason := turn.get("malformed"):
                message = {"role": "tool", "name": "unknown", "content": str({"error": reason})}
                ends = self.malformed == "end"
                answers[episode] = Answer([], ending="parse_error") if ends else Answer([message])
            else:
                answers[episode] = Answer([], ending="" if turn.get("tool_calls") else "completed")
        calls = [
            [(episode, call["function"]) for call in turn.get("tool_calls") or ()] for episode, turn in turns
        ]
        for column in itertools.zip_longest(*calls):
            pending = [pair for pair in column if pair is not None and not pair[0].failure]
            attempts = self._call([(e, partial(_use, e.tools, function)) for e, function in pending])
            for (episode, function), (output, error, _) in zip(pending, attempts, strict=True):
                if isinstance(error, Overdue):
                    kind = type(episode.environment).__name__
                    answers[episode] = self._fail(episode, f"{kind}.{function['name']}", error)
                    continue
                content = written(output if error is None else {"error": str(error)}, str)
                message = {"role": "tool", "name": function["name"], "content": content}
                answers[episode].messages.append(message)
        return answers


@contextlib.contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Interrupt Python code and waits in the block after some seconds; a signal needs no thread.

    Raises:
        Overdue: the deadline was missed.
        Refused: signals are impossible, as outside the main thread.
    """
    if seconds is None:
        yield
        return

    def interrupt(*_: object) -> None:
        raise Overdue

    try:
        before = signal.signal(signal.SIGALRM, interrupt)
    except (AttributeError, ValueError) as error:
        raise Refused(
            f"reward_timeout bounds calls of an environment by a signal, which is impossible here "
            f"({describe(error)}): leave it out, or run on Linux or macOS in the main thread."
        ) from error
    began, timer = time.monotonic(), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    finally:  # also if the signal arrived while the timer was switched off
        signal.signal(signal.SIGALRM, before)
        if timer[0]:
            rest = max(timer[0] - (time.monotonic() - began), 1e-6)
            signal.setitimer(signal.ITIMER_REAL, rest, timer[1])


@types.coroutine
def _driven(awaitable: Awaitable[Any], streams: Streams) -> Generator[Any, Any, Any]:
    """Await something with the streams swapped in only while its code runs, not while it waits."""

    async def awaited() -> Any:
        return await awaitable

    coroutine = awaited()
    resume = partial(coroutine.send, None)
    while True:
        try:
            with streams:
                waits_for = resume()
        except StopIteration as end:
            return end.value
        try:
            resume = partial(coroutine.send, (yield waits_for))
        except BaseException as error:  # such as the cancellation at the deadline
            resume = partial(coroutine.throw, error)


def _is_gymnasium(environment: Any) -> bool:
    return hasattr(environment, "step") and "seed" in inspect.signature(environment.reset).parameters


def _gives_rewards(environment: Any) -> bool:
    return _is_gymnasium(environment) or hasattr(environment, "get_reward")


def _tools(environment: Any) -> list[Callable[..., Any]]:
    """Return the tools of an environment, as TRL takes them: the public functions of its class."""
    if _is_gymnasium(environment):
        return []
    members = inspect.getmembers(type(environment), inspect.isfunction)
    names = [name for name, _ in members if name not in ("reset", "get_reward") and not name.startswith("_")]
    return [getattr(environment, name) for name in names]


def _use(tools: Sequence[Callable[..., Any]], function: Mapping[str, Any]) -> Any:
    named = {tool.__name__: tool for tool in tools}
    if function["name"] not in named:
        raise ValueError(f"There is no tool {function['name']}; there are {', '.join(named)}.")
    return named[function["name"]](**function["arguments"])


def _observation(text: str, info: Mapping[str, Any]) -> str:
    """Return an observation between GEM's prefix and suffix; TypeError if one of them is no text."""
    return "".join([info.get("prefix") or "", text, info.get("suffix") or ""])


def _appended(prompt: str | list[Message], text: str) -> str | list[Message]:
    """Return the prompt with the text at its end, of messages at the end of the last one of the user."""
    if isinstance(prompt, str):
        return prompt + text
    last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=None)
    if last is None:
        return [*prompt, {"role": "user", "content": text}]
    message = {**prompt[last], "content": prompt[last]["content"] + text}
    return [*prompt[:last], message, *prompt[last + 1 :]]


def _named(factory: Any) -> str:
    return str(getattr(factory, "__name__", written(factory)))


def _line(error: BaseException) -> str:
    """Return at which line of the user's an error came about, as in ' (envs.py, line 7)'."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = (number for number, frame in enumerate(frames) if Path(frame.filename).parent != ROOM)
    return location(error, next(theirs, len(frames)))


def assistant_message(
    tokenizer: Any, ids: Sequence[int], prefix: Sequence[int], text: str, tools: Sequence[Callable[..., Any]]
) -> Message:
    """Return a turn of the policy as a message, with the calls of tools that are in it.

    Args:
        tokenizer: reads calls as its `response_template` says.
        ids: token ids of the turn.
        prefix: token ids of all that is before it.
        text: the text of the turn.
        tools: the tools of its environment; without tools no calls are looked for.

    Returns:
        A message with `role` and `content`; with `tool_calls` if there are any, and with `malformed`, the
        reason, if a call cannot be parsed.

    Raises:
        Refused: there are tools, and the tokenizer has no `response_template`.
    """
    message = {"role": "assistant", "content": text}
    if not tools:
        return message
    if getattr(tokenizer, "response_template", None) is None:
        raise Refused(
            "The environment has tools, but the tokenizer has no response_template, which says how calls are "
            "written: set tokenizer.response_template, or give the environment the interface of gymnasium."
        )
    try:
        parsed = tokenizer.parse_response(list(ids), prefix=list(prefix), tools=list(tools))
        calls = parsed.get("tool_calls") or []
        for call in calls:
            dict(call["function"]["arguments"]), str(call["function"]["name"])
    except Exception as error:  # the parser raises errors of many kinds
        return message | {"malformed": describe(error)}
    return {**message, **parsed, "tool_calls": calls} if calls else message
