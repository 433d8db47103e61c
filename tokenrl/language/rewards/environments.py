"""Plays episodes of several turns in environments that answer text with text, or that offer tools.

Two interfaces are understood. Gymnasium's on text: `reset(seed=...) -> (text, info)` and
`step(text) -> (text, reward, terminated, truncated, info)`, where GEM's `info["prefix"]` and `info["suffix"]`
stand around an observation. And TRL's: `reset(**row)` returns None or text, the other public methods are
tools, and `get_reward()` rewards the whole episode. An object with `step`, whose `reset` has a parameter
`seed`, has gymnasium's interface. Methods may be async; those of all rows are then awaited together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
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
from tokenrl.language.rewards.calls import reward_number
from tokenrl.language.rewards.isolation import Overdue, RandomStreams, call_all
from tokenrl.language.rewards.tools import Message, check_tool, encodable, joined, reply, use
from tokenrl.settings import LARGEST_REWARD, shown
from tokenrl.user_code import copied

REWARD = f"a number from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
STEP = f"(text, reward, terminated, truncated, info), where the reward is {REWARD}"
RESET = "(text, info) in gymnasium's interface, and None or text in TRL's"
NO_TOOLS = {"reset", "get_reward"}


class Answer(NamedTuple):
    """What an environment answers to a turn.

    Attributes:
        messages: what the policy reads next, each with a role ("user" or "tool") and content. Those of an
            episode that is over are shown to people, and no policy reads them.
        reward: the reward of the turn that was answered.
        ending: empty if the episode goes on, else a name of `ENDINGS` in rollout/episodes.py.
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
        opening: the prompt of the row, with the text of reset joined to its last user message.
        observation: the text of reset.
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
    observation: str = ""
    streams: RandomStreams = field(default_factory=lambda: RandomStreams(0), repr=False)
    steps: bool = False
    tools: Sequence[Callable[..., Any]] = ()
    ending: str = ""
    failure: str = ""

    def name_of(self, method: str) -> str:
        """Return what messages call a method of the environment."""
        return f"{type(self.environment).__name__}.{method}"

    def fail(self, call: str, problem: BaseException | str) -> Answer:
        """End the episode because a call raised something or returned something wrong; return that answer."""
        self.ending = "timeout" if isinstance(problem, Overdue) else "error"
        if isinstance(problem, str):
            fault = f"returned {problem}"
        elif isinstance(problem, Overdue):
            mend = "make it faster, or raise reward_timeout"
            fault = f"did not return within {problem} s{code_line(problem, first=True)}: {mend}"
        else:
            fault = f"raised {describe(problem)}{code_line(problem, first=True)}"
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
        factory: a class or function that makes an environment, or a dict of them by the column `environment`.
        max_turns: the most turns of the policy in an episode.
        share_seed: whether the episodes of a prompt's group are reset with the same seed.
        malformed: a tool call that cannot be parsed ends the episode ("end") or is answered ("observe").
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
        self._first: dict[str | None, Episode] = {}
        self.rewarded = self.has_tools = False
        self.__name__ = "environment"
        for name in factories:
            first = self._first[name] = self._checked(Episode(None, "", name))
            self.rewarded |= first.steps or hasattr(first.environment, "get_reward")
            self.has_tools |= bool(first.tools)
            if len(factories) == 1:
                self.__name__ = type(first.environment).__name__

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
                problem = f"{name!r}, which names no environment"
                hint = suggest(str(name), map(str, self._first))
                raise Refused(f"The column environment of {location} is {problem}.{hint}")
            first = self._first[name]
            try:
                inspect.signature(first.environment.reset).bind(**self._options(row, 0))
            except TypeError as error:
                problem = f"{first.name_of('reset')} cannot take the columns of {location}: {error}"
                hint = "Give it parameters for those it needs, and **kwargs."
                raise Refused(f"{problem}. {hint}") from error

    def tools(self, row: Mapping[str, Any]) -> Sequence[Callable[..., Any]]:
        """Return the tools of a row's environment; none of a row that names no environment."""
        return self._first[self._name(row)].tools if self._name(row) in self._first else ()

    def reset(self, rows: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[Episode]:
        """Begin an episode for each of N rows.

        Args:
            rows: N rows with their columns, `prompt` among them unless the environments write it.
            seeds: N integers of 31 bits, which decide all that an environment draws.

        Raises:
            Refused: as in `check_rows`.
        """
        self.check_rows(rows)
        episodes = []
        resets = {}
        for row, seed in zip(rows, seeds, strict=True):
            prompt = copied(row.get("prompt", ""))
            episode = self._make(
                Episode(None, prompt, self._name(row), streams=RandomStreams(seed))
            )
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
        steps = {}
        turns = {}
        for episode, message in zip(episodes, messages, strict=True):
            if episode.steps:
                steps[episode] = partial(episode.environment.step, message["content"])
            else:
                turns[episode] = message
        answers = self._ask("step", steps, _stepped, STEP) | self._call_tools(turns)
        return [answers[episode] for episode in episodes]

    def finish(self, episodes: Sequence[Episode]) -> list[Answer]:
        """End N episodes: return what `get_reward` says of those that did not fail; call it once for each.

        The reward is 0 with gymnasium's interface, and where there is no `get_reward`.
        """
        rewards = {}
        for episode in episodes:
            environment = episode.environment
            if not (episode.failure or episode.steps) and hasattr(environment, "get_reward"):
                rewards[episode] = environment.get_reward
        answers = self._ask(
            "get_reward", rewards, lambda _, output: Answer([], reward_number(output)), REWARD
        )
        self.release(episodes)
        return [answers.get(episode, Answer([])) for episode in episodes]

    def release(self, episodes: Sequence[Episode]) -> None:
        """Set the instances of N episodes free, but for those that failed."""
        for episode in episodes:
            if not episode.failure:
                self._free[episode.name].append(episode.environment)

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
        make = self._factories[episode.name]
        free = self._free[episode.name]
        fault: Any = None
        if free:
            instance = free.pop()
        else:
            # In a random state of its own, as the episode must not depend on whether the instance is new.
            instance, fault, _ = call_all([(RandomStreams(0), make)], self.timeout)[0]
        episode.environment = instance
        try:
            if fault is None and not callable(getattr(instance, "reset", None)):
                fault = f"a {type(instance).__name__}, which has no method reset"
            if fault is None and hasattr(instance, "step"):
                episode.steps = "seed" in inspect.signature(instance.reset).parameters
        except USER_CODE_FAILED as error:  # attributes may be computed
            fault = error
        if fault is not None:
            episode.fail(getattr(make, "__name__", written(make)), fault)
            return episode
        if not episode.steps:
            # As TRL lists them: the class is read, since an instance may compute attributes.
            methods = dict(inspect.getmembers(type(instance), inspect.isfunction))
            names = sorted(methods.keys() - NO_TOOLS)
            episode.tools = [getattr(instance, name) for name in names if name[0] != "_"]
        return episode

    def _checked(self, episode: Episode) -> Episode:
        """Make the first instance of an environment, check its tools, and set it free."""
        if self._make(episode).failure:
            raise Refused(
                f"{episode.failure} An environment is made by a class or a function without arguments, and "
                "has gymnasium's reset(seed=...) and step(text), or reset(**row) and methods that are tools."
            )
        if episode.steps:
            try:
                inspect.signature(episode.environment.step).bind("a text")
            except TypeError as error:
                problem = f"{episode.name_of('step')} cannot be called with a text alone: {error}"
                raise Refused(f"{problem}. Return {STEP}.") from error
        for tool in episode.tools:
            check_tool(tool)
        self._free[episode.name].append(episode.environment)
        return episode

    def _ask(
        self, method: str, calls: Mapping[Episode, Any], read: Callable[..., Answer], returns: str
    ) -> dict[Episode, Answer]:
        """Call a method of N environments, and make answers of what they return; `returns` describes it.

        A method whose results are all wrong, and were never right, has a mistake in its code, which is no
        failure of an episode.

        Raises:
            Stopped: a method has never returned what it must.
        """
        answers = {}
        wrong = dict[str, str]()
        attempts = call_all([(e.streams, call) for e, call in calls.items()], self.timeout)
        for episode, (output, error, _) in zip(calls, attempts, strict=True):
            name = episode.name_of(method)
            if error:
                answers[episode] = episode.fail(name, error)
                continue
            try:
                answers[episode] = read(episode, output)
                self._right.add(name)
            except Exception:
                problem = f"{shown(output)}; it must return {returns}"
                answers[episode] = episode.fail(name, problem)
                wrong[name] = episode.failure
        for name, failure in sorted(wrong.items()):
            if name not in self._right:
                raise Stopped(failure)
        return answers

    def _call_tools(self, turns: Mapping[Episode, Message]) -> dict[Episode, Answer]:
        """Call the tools of N turns: the first call of each turn, then the second of each, and so on."""
        answers = {}
        for episode, turn in turns.items():
            answers[episode] = Answer([], ending="" if turn.get("tool_calls") else "completed")
            reason = turn.get("malformed")
            if reason and self.malformed == "end":
                answers[episode] = Answer([], ending="parse_error")
            elif reason:
                answers[episode] = Answer([reply("unknown", None, reason)])
        queues = {episode: list(turn.get("tool_calls", ())) for episode, turn in turns.items()}
        while True:
            active = [e for e, queue in queues.items() if queue and not e.failure]
            if not active:
                return answers
            calls = []
            for episode in active:
                function = queues[episode][0]["function"]
                tool = partial(use, episode.tools, function["name"], copied(function["arguments"]))
                calls.append((episode.streams, tool))
            attempts = call_all(calls, self.timeout)
            for episode, (output, error, _) in zip(active, attempts, strict=True):
                name = queues[episode].pop(0)["function"]["name"]
                if isinstance(error, Overdue):
                    answers[episode] = episode.fail(episode.name_of(name), error)
                else:
                    answers[episode].messages.append(reply(name, output, error))


def _opened(episode: Episode, output: Any) -> Answer:
    """Add what `reset` returned to the prompt, of messages at the end of the last one of the user."""
    if episode.steps:
        output = _observation(*output)
    if isinstance(output, list):
        output = "".join(block["text"] for block in output)
    text = episode.observation = "" if output is None else encodable(output)
    if isinstance(episode.opening, str):
        episode.opening = joined(episode.opening, text)
    elif text:
        users = [message for message in episode.opening if message["role"] == "user"]
        if not users:
            problem = "a text, but the prompt has no message of the user at the end of which it could stand"
            return episode.fail(episode.name_of("reset"), problem)
        users[-1]["content"] = joined(users[-1]["content"], text)
    return Answer([])


def _stepped(episode: Episode, output: Any) -> Answer:
    observation, reward, terminated, truncated, info = output
    messages = [{"role": "user", "content": _observation(observation, info)}]
    ending = "max_turns" if truncated else ""
    return Answer(messages, reward_number(reward), "completed" if terminated else ending)


def _observation(text: str, info: Mapping[str, Any]) -> str:
    """Return an observation between GEM's prefix and suffix; TypeError if one of them is no text."""
    return encodable((info.get("prefix") or "") + text + (info.get("suffix") or ""))
