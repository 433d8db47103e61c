"""Plays episodes of several turns in environments that answer text with text, or that offer tools.

Two interfaces are understood. Gymnasium's on text: `reset(seed=...) -> (text, info)` and
`step(text) -> (text, reward, terminated, truncated, info)`, where GEM's `info["prefix"]` and `info["suffix"]`
stand around an observation. And TRL's: `reset(**row)` returns None or text, the other public methods are
tools, and `get_reward()` rewards the whole episode. An object with `step`, whose `reset` has a parameter
`seed`, has gymnasium's interface. Methods may be async; those of all rows are then awaited together.
"""

from __future__ import annotations

import inspect
import itertools
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.errors import (
    USER_CODE_FAILED,
    Refused,
    Stopped,
    code_line,
    describe,
    suggest,
    with_places,
    written,
)
from tokenrl.language.rewards.calls import Attempt, Overdue, copied, reward_number
from tokenrl.language.rewards.isolation import Streams, call_all
from tokenrl.language.rewards.tools import Message, use
from tokenrl.settings import LARGEST_REWARD, shown

ENDINGS = (
    "completed",
    "max_turns",
    "max_tokens",
    "context_overflow",
    "parse_error",
    "error",
    "timeout",
)
"""Why an episode ended. `completed`: the environment ended it, or the policy called no tool."""
REWARD = f"a number from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
STEP = f"(text, reward, terminated, truncated, info), where the reward is {REWARD}"
RESET = "(text, info) in gymnasium's interface, and None or text in TRL's"

NO_TOOLS = {"reset", "get_reward"}
ROOM = Path(__file__).parent


class Answer(NamedTuple):
    """What an environment answers to a turn.

    Attributes:
        messages: what the policy reads next, each with a role ("user" or "tool") and content. Those of an
            episode that is over are shown to people, and no policy reads them.
        reward: the reward of the turn that was answered.
        ending: empty if the episode goes on, else a name of `ENDINGS`.
        failure: with the endings `error` and `timeout` one sentence that names class, method, problem, line.
    """

    messages: list[Message]
    reward: float = 0.0
    ending: str = ""
    failure: str = ""


@dataclass(eq=False)
class Episode:
    """The episode of one row, under way or over.

    Attributes:
        environment: the user's object; None if it could not be made.
        opening: the prompt of the row, with the observation of reset appended to its last user message.
        name: the name of its factory; None if there is only one.
        streams: its random state.
        steps: whether the environment has gymnasium's interface.
        tools: the tools of the environment, for the chat template; empty with gymnasium's interface.
        ending: empty while the episode goes on, else why it failed, a name of `ENDINGS`.
        failure: a sentence that says what failed; empty if nothing did.
    """

    environment: Any
    opening: str | list[Message]
    name: str | None = None
    streams: Streams = field(default_factory=lambda: Streams(0), repr=False)
    steps: bool = False
    tools: Sequence[Callable[..., Any]] = ()
    ending: str = ""
    failure: str = ""

    def fail(self, call: str, problem: BaseException | str) -> Answer:
        """End the episode because a call raised something or returned something wrong; return that answer."""
        late = isinstance(problem, Overdue)
        self.ending, fault = "timeout" if late else "error", f"returned {problem}"
        if isinstance(problem, BaseException):
            frames = traceback.extract_tb(problem.__traceback__)
            theirs = (
                number for number, frame in enumerate(frames) if Path(frame.filename).parent != ROOM
            )
            line = code_line(problem, next(theirs, len(frames)))
            overdue = (
                f"did not return within {problem} s{line}: make it faster, or raise reward_timeout"
            )
            fault = overdue if late else f"raised {describe(problem)}{line}"
        self.failure = encodable(f"{call} {fault}.")
        return Answer([], 0.0, self.ending, self.failure)


@dataclass(eq=False)
class Environments:
    """Environments of one factory or several, which are made once and used again.

    An instance is free again once its episode was finished, so reward functions may look at it until the next
    `reset`. One that failed or missed the deadline is not used again. The environments are a reward function
    themselves: called so, they return the rewards that they gave in N episodes. It has the name of the class,
    or "environment" if there are several.

    Attributes:
        factory: a class or function without arguments that returns an environment, or a dictionary of them,
            from which the column `environment` of a row chooses.
        max_turns: the most turns of the policy in an episode.
        share_seed: whether the episodes of a prompt's group are reset with the same seed.
        malformed: a tool call that cannot be parsed ends the episode ("end"), or is answered with the error
            ("observe").
        timeout: seconds that one call of an environment may take; None: as long as it likes.
        rewarded: whether an environment of them gives rewards.
        has_tools: whether an environment of them has tools.
    """

    factory: Any
    max_turns: int = 10
    share_seed: bool = True
    malformed: str = "end"
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Make one instance of each environment, and check it.

        Raises:
            Refused: an environment cannot be made, has no `reset`, a `step` that takes no text, or a tool
                without type hints or docstring; a deadline is impossible here.
        """
        factories = self.factory if isinstance(self.factory, Mapping) else {None: self.factory}
        self._factories: Mapping[str | None, Callable[[], Any]] = factories
        self._right = set[str]()  # the methods that have returned what they must
        self._free: dict[str | None, list[Any]] = {name: [] for name in factories}
        self._first = {name: self._checked(Episode(None, "", name)) for name in factories}
        instances = [episode.environment for episode in self._first.values()]
        self.__name__ = "environment" if len(instances) != 1 else type(instances[0]).__name__
        self.rewarded = any(
            e.steps or hasattr(e.environment, "get_reward") for e in self._first.values()
        )
        self.has_tools = any(episode.tools for episode in self._first.values())

    def __call__(self, environment_rewards: list[float | None], **_: Any) -> list[float | None]:
        """Return the rewards of N episodes, None for one that failed."""
        return environment_rewards

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Check that each row names an environment, the `reset` of which takes its columns.

        Raises:
            Refused: a row names none, or its columns do not fit.
        """
        for location, row in with_places(rows):
            name = self._name(row)
            if name not in self._first:
                problem = (
                    f"The column environment of {location} is {name!r}, which names no environment"
                )
                raise Refused(f"{problem}.{suggest(str(name), map(str, self._first))}")
            environment = self._first[name].environment
            try:
                inspect.signature(environment.reset).bind(**self._options(row, 0))
            except TypeError as error:
                problem = f"{type(environment).__name__}.reset cannot take the columns of {location}: {error}"
                raise Refused(
                    f"{problem}. Give it parameters for those it needs, and **kwargs."
                ) from error

    def reset(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Episode]:
        """Begin an episode for each of N rows.

        Args:
            rows: N rows with their columns, `prompt` among them unless the environments write it.
            seeds: N integers of 31 bits, which decide all that an environment draws.

        Raises:
            Refused: as in `check_rows`.
        """
        self.check_rows(rows)
        episodes, resets = [], {}
        for row, seed in zip(rows, seeds, strict=True):
            prompt = copied(row.get("prompt", ""))
            episode = self._make(Episode(None, prompt, self._name(row), Streams(seed)))
            episodes.append(episode)
            if not episode.failure:
                options = copied(self._options(row, seed))  # an environment may change them
                resets[episode] = partial(episode.environment.reset, **options)
        self._ask("reset", resets, _opened, RESET)
        return episodes

    def step(self, episodes: Sequence[Episode], messages: Sequence[Message]) -> list[Answer]:
        """Answer one turn of the policy in each of N episodes.

        Args:
            episodes: N episodes that go on.
            messages: N messages of the assistant with `content`, and with `tool_calls` or `malformed`, the
                reason why a call cannot be parsed.
        """
        turns = dict(zip(episodes, messages, strict=True))
        steps = {
            e: partial(e.environment.step, turn["content"]) for e, turn in turns.items() if e.steps
        }
        answers = self._ask("step", steps, _stepped, STEP)
        answers |= self._call_tools({e: turn for e, turn in turns.items() if not e.steps})
        return [answers[episode] for episode in episodes]

    def finish(self, episodes: Sequence[Episode]) -> list[Answer]:
        """End N episodes: return what `get_reward` says of those that did not fail; call it once for each.

        The reward is 0 with gymnasium's interface, and where there is no `get_reward`.
        """
        live = [
            e
            for e in episodes
            if not (e.failure or e.steps) and hasattr(e.environment, "get_reward")
        ]
        rewards = {episode: episode.environment.get_reward for episode in live}
        answers = self._ask(
            "get_reward", rewards, lambda _, x: Answer([], reward_number(x)), REWARD
        )
        for episode in episodes:
            if not episode.failure:
                self._free[episode.name].append(episode.environment)
        return [answers.get(episode, Answer([])) for episode in episodes]

    def _name(self, row: Mapping[str, Any]) -> str | None:
        return None if None in self._factories else row.get("environment")

    def _options(self, row: Mapping[str, Any], seed: int) -> dict[str, Any]:
        """Return the arguments of `reset`: a seed, or the columns of the row but the one that chooses."""
        name = self._name(row)
        if self._first[name].steps:
            return {"seed": seed}
        return {key: row[key] for key in row if key != "environment" or name is None}

    def _make(self, episode: Episode) -> Episode:
        """Give an episode a free instance of its environment, else a new one; return the episode."""
        make, free = self._factories[episode.name], self._free[episode.name]
        # Made in a random state of its own, as the episode must not depend on whether the instance is new.
        attempt = (
            Attempt(free.pop(), None, 0.0)
            if free
            else call_all([(Streams(0), make)], self.timeout)[0]
        )
        instance = episode.environment = attempt.output
        fault: Any = attempt.error
        try:
            if fault is None and not callable(getattr(instance, "reset", None)):
                fault = f"a {type(instance).__name__}, which has no method reset"
            if fault is None and hasattr(instance, "step"):
                episode.steps = "seed" in inspect.signature(instance.reset).parameters
                if episode.steps and not callable(instance.step):
                    fault = f"a {type(instance).__name__}, whose step is no method"
        except USER_CODE_FAILED as error:  # attributes may be computed
            fault = error
        if fault is not None:
            episode.fail(getattr(make, "__name__", written(make)), fault)
            return episode
        if (
            not episode.steps
        ):  # as TRL lists them: the class is read, as an instance may compute attributes
            names = dict(inspect.getmembers(type(instance), inspect.isfunction)).keys() - NO_TOOLS
            episode.tools = [getattr(instance, name) for name in sorted(names) if name[0] != "_"]
        return episode

    def _checked(self, episode: Episode) -> Episode:
        """Make the first instance of an environment, check its tools, and set it free."""
        if self._make(episode).failure:
            raise Refused(
                f"{episode.failure} An environment is made by a class or a function without arguments, and "
                "has gymnasium's reset(seed=...) and step(text), or reset(**row) and methods that are tools."
            )
        if episode.steps:
            name = f"{type(episode.environment).__name__}.step"
            try:
                inspect.signature(episode.environment.step).bind("a text")
            except TypeError as error:
                raise Refused(
                    f"{name} cannot be called with a text alone: {error}. Return {STEP}."
                ) from error
        for tool in episode.tools:
            from transformers.utils import get_json_schema

            try:
                get_json_schema(tool)
            except Exception as error:
                problem = f"{tool.__qualname__} cannot be a tool ({describe(error)})"
                mend = (
                    "give it type hints and a docstring with a line for each argument below `Args:`"
                )
                seed = ", or give reset a parameter seed, as gymnasium has it" * (
                    tool.__name__ == "step"
                )
                raise Refused(f"{problem}: {mend}, or a name with _ in front{seed}.") from error
        self._free[episode.name].append(episode.environment)
        return episode

    def _ask(
        self, method: str, calls: Mapping[Episode, Any], read: Callable[..., Answer], returns: str
    ) -> dict[Episode, Answer]:
        """Call a method of N environments, and make answers of what they return; `returns` describes it.

        Two are called before the others. What is wrong in both, and was never right, is no failure of an
        episode but a mistake in the code.

        Raises:
            Stopped: a method has never returned what it must.
        """
        answers, episodes = {}, list(calls)
        for some in (episodes[:2], episodes[2:]):
            attempts = call_all(
                [(episode.streams, calls[episode]) for episode in some], self.timeout
            )
            wrong = dict[str, str]()
            for episode, (output, error, _) in zip(some, attempts, strict=True):
                call = f"{type(episode.environment).__name__}.{method}"
                try:
                    answers[episode] = episode.fail(call, error) if error else read(episode, output)
                    self._right |= set() if error else {call}
                except Exception:
                    answers[episode] = episode.fail(
                        call, f"{shown(output)}; it must return {returns}"
                    )
                    wrong[call] = episode.failure
            if never := wrong.keys() - self._right:
                raise Stopped(wrong[min(never)])
        return answers

    def _call_tools(self, turns: Mapping[Episode, Message]) -> dict[Episode, Answer]:
        """Call the tools of N turns: the first call of each turn, then the second of each, and so on."""
        answers = {}
        for episode, turn in turns.items():
            answers[episode] = Answer([], ending="" if turn.get("tool_calls") else "completed")
            if reason := turn.get("malformed"):
                observed = Answer([_reply("unknown", None, reason)])
                answers[episode] = (
                    Answer([], ending="parse_error") if self.malformed == "end" else observed
                )
        calls = [
            [(e, call["function"]) for call in turn.get("tool_calls", ())]
            for e, turn in turns.items()
        ]
        for column in itertools.zip_longest(*calls):
            pending = [pair for pair in column if pair is not None and not pair[0].failure]
            uses = [
                (e.streams, partial(use, e.tools, f["name"], copied(f["arguments"])))
                for e, f in pending
            ]
            attempts = call_all(uses, self.timeout)
            for (episode, function), (output, error, _) in zip(pending, attempts, strict=True):
                tool = f"{type(episode.environment).__name__}.{function['name']}"
                if isinstance(error, Overdue):
                    answers[episode] = episode.fail(tool, error)
                else:
                    answers[episode].messages.append(_reply(function["name"], output, error))
        return answers


def _reply(name: str, output: Any, error: object = None) -> Message:
    """Return the message of a tool, with what it returned or with the error."""
    result = output if error is None else {"error": written(error, str)}
    return {"role": "tool", "name": encodable(name), "content": encodable(written(result, str))}


def _opened(episode: Episode, output: Any) -> Answer:
    """Append what `reset` returned to the prompt, of messages at the end of the last one of the user."""
    if episode.steps:
        output = _observation(*output)
    if isinstance(output, list):
        output = "".join(block["text"] for block in output)
    text, prompt = "" if output is None else encodable(output), episode.opening
    if isinstance(prompt, str):
        episode.opening = prompt + text
    elif text:
        users = [message for message in prompt if message["role"] == "user"]
        if not users:
            problem = "a text, but the prompt has no message of the user at the end of which it could stand"
            return episode.fail(f"{type(episode.environment).__name__}.reset", problem)
        users[-1]["content"] += text
    return Answer([])


def _stepped(episode: Episode, output: Any) -> Answer:
    observation, reward, terminated, truncated, info = output
    messages = [{"role": "user", "content": _observation(observation, info)}]
    ending = "completed" if terminated else "max_turns" if truncated else ""
    return Answer(messages, reward_number(reward), ending)


def _observation(text: str, info: Mapping[str, Any]) -> str:
    """Return an observation between GEM's prefix and suffix; TypeError if one of them is no text."""
    return encodable("".join([info.get("prefix") or "", text, info.get("suffix") or ""]))


def encodable(text: str) -> str:
    """Return a text with `?` for half a pair of surrogates, which tokenizers and files do not take."""
    return text.encode(errors="replace").decode()
