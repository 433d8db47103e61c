"""Saves the state of environments and gives it to fresh copies, so that a resumed run continues exactly.

What Python can show is saved: numbers, texts, arrays and random generators, and lists, tuples, dicts, sets
and deques of them, in the attributes of an environment, of its wrappers and of the copies that are stepped
together. Other state, such as the bodies of a physics engine, cannot be saved. A copy that has such state
records its actions. To load it, they are replayed from a reset on, and what can be compared must be equal
afterwards; so an environment that is not deterministic is found out.
"""

from __future__ import annotations

import functools
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv, VectorEnv

from tokenrl.control.values import Hidden, Reader, Writer

FIXED = {"metadata", "_metadata", "autoreset_mode", "spec"}
"""Attributes, by their names in gymnasium, that no step changes."""
COPIES = {"envs", "env_fns"}
"""The copies in a vector environment of gymnasium, which are saved each by itself, and what made them."""
FIXED_TYPES = (
    *(EnvSpec, np.dtype, type, types.ModuleType, functools.partial),
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodType),
)
LARGE = 10
"""Containers with this many items, such as tables of transitions, are compared between copies."""
ENOUGH = 1_000
"""Moves after which a record is ended at the next reset, since to begin one takes as long as a few moves."""
LONGEST_REPLAY = 20_000
"""Environments with longer episodes are not recorded, since replaying many copies would take minutes."""


class Captured(NamedTuple):
    """The state of one environment, by the path of the attribute: texts, values, and what has no text."""

    texts: dict[str, str]
    values: dict[str, Any]
    hidden: list[str]


def capture(environment: gymnasium.Env[Any, Any] | VectorEnv, like: Captured | None = None) -> Captured:
    """Return the state of an environment and of all that it wraps; `restore` gives it to another.

    Args:
        environment: the environment.
        like: the state of another copy. Large tables that are equal in both are not written again.
    """
    values = dict(_attributes(environment, set()))
    hidden: list[str] = []
    while True:  # again without what is hidden, so that no text refers to it
        writer, texts, before = Writer(values), dict[str, str](), len(hidden)
        for path, value in values.items():
            try:
                known = like is not None and path in like.texts and _same_table(value, like.values[path])
                texts[path] = like.texts[path] if like and known else writer.attribute(path, value)
            except Hidden:
                hidden.append(path)
        if not writer.referred.intersection(hidden[before:]):
            return Captured(texts, values, hidden)
        values = {path: value for path, value in values.items() if path in texts}


def _same_table(one: Any, other: Any) -> bool:
    """Return whether both are large containers of numbers and texts, and equal."""
    if type(one) is not type(other) or type(one) not in (dict, list, tuple) or len(one) < LARGE:
        return False
    try:
        return bool(one == other)
    except ValueError:  # of arrays inside
        return False


def restore(environment: gymnasium.Env[Any, Any] | VectorEnv, texts: Mapping[str, str]) -> None:
    """Give a fresh environment that has been reset the texts that `capture` found in an equal one."""
    owners = {path: _owner(environment, path) for path in texts}
    now = {path: owner.get(path.rpartition(".")[2]) for path, owner in owners.items()}
    reader = Reader(texts, now)
    for path, owner in owners.items():
        owner[path.rpartition(".")[2]] = reader.attribute(path)


def _attributes(thing: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yield paths and values of all attributes that a step or a reset may change."""
    seen.add(id(thing))
    fixed = FIXED | COPIES if isinstance(thing, SyncVectorEnv) else FIXED
    for name, value in vars(thing).items():
        if name in fixed or isinstance(value, FIXED_TYPES):
            continue
        if isinstance(value, gymnasium.Space):  # only its random generator, with which it samples, changes
            if vars(value).get("_np_random") is not None:
                yield f"{name}._np_random", vars(value)["_np_random"]
        elif not isinstance(value, (gymnasium.Env, VectorEnv)):
            yield name, value
        elif id(value) not in seen:
            yield from ((f"{name}.{path}", found) for path, found in _attributes(value, seen))


def _owner(thing: Any, path: str) -> dict[str, Any]:
    """Return the attributes among which is the last one of a path."""
    for name in path.split(".")[:-1]:
        thing = vars(thing)[name]
    return vars(thing)


class Recorded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Records what to replay: the state before a reset, the seed, and all moves, from that reset on.

    A move is an action, or None for a further reset. A new record begins with the first reset after `ENOUGH`
    moves, or with a seed.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        """Record from the next reset on."""
        super().__init__(env)
        self.before: dict[str, str] | None = None
        self.seed: int | None = None
        self.moves: list[Any] = []
        self.observation: Any = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, Any]:
        """Begin an episode, and perhaps a new record."""
        if self.before is None or seed is not None or len(self.moves) >= ENOUGH:
            self.before, self.seed, self.moves = capture(self.env).texts, seed, []
        else:
            self.moves.append(None)
        self.observation, info = self.env.reset(seed=seed, options=options)
        return self.observation, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Take a step, and record its action."""
        self.moves.append(action)
        answer = self.env.step(action)
        self.observation = answer[0]
        return answer

    def tape(self) -> dict[str, Any]:
        """Return the record, without the state before it, and the last observation, as plain values."""
        resets = [place for place, move in enumerate(self.moves) if move is None]
        actions = np.array([move for move in self.moves if move is not None])
        texts = {"actions": Writer({}).text(actions), "observation": Writer({}).text(self.observation)}
        return {"seed": self.seed, "resets": resets, **texts}

    def replay(self, before: Mapping[str, str], tape: Mapping[str, Any]) -> bool:
        """Play a record; return whether the record of it is the same."""
        restore(self.env, before)
        self.before = None
        self.reset(seed=tape["seed"])
        self.before = dict(before)  # as it was recorded: without what only the first reset has made
        moves = list(Reader({}, {}).value(json.loads(tape["actions"])))
        for place in tape["resets"]:
            moves.insert(place, None)
        for move in moves:
            self.reset() if move is None else self.step(move)
        return self.tape() == tape


def record(vector: VectorEnv, probe: VectorEnv, horizon: int) -> None:
    """Let copies record their episodes from their next reset on, if they have state that cannot be saved.

    Copies that are stepped together by the environment's own code cannot be replayed one by one.

    Args:
        vector: the copies.
        probe: one more copy, which has been reset and so shows whether there is such state.
        horizon: the largest number of steps of an episode.
    """
    if not isinstance(vector, SyncVectorEnv) or not isinstance(probe, SyncVectorEnv):
        return
    if horizon <= LONGEST_REPLAY and capture(probe.envs[0]).hidden:
        vector.envs = [Recorded(copy) for copy in vector.envs]


def state_of(vector: VectorEnv) -> dict[str, Any]:
    """Return the state of all copies, as plain values.

    The entry `exact` says whether `load_state` can restore all of it.
    """
    copies = list(vector.envs) if isinstance(vector, SyncVectorEnv) else []
    replays = [copy for copy in copies if isinstance(copy, Recorded)]
    found: list[Captured] = []
    for copy in copies:
        inside = copy.env if isinstance(copy, Recorded) else copy
        found.append(capture(inside, found[0] if found else None))
    whole = capture(vector)
    replay = None
    if replays and all(copy.before is not None for copy in replays):
        replay = {
            "before": _columns([copy.before or {} for copy in replays]),
            "tapes": [copy.tape() for copy in replays],
        }
    return {
        "vector": whole.texts,
        "copies": _columns([one.texts for one in found]),
        "replay": replay,
        "exact": not whole.hidden and (bool(replays) or not any(one.hidden for one in found)),
    }


def load_state(vector: VectorEnv, state: Mapping[str, Any]) -> bool:
    """Give fresh copies what `state_of` returned; return whether their state is exactly the saved one."""
    vector.reset(seed=0)  # makes what only a reset makes
    exact = bool(state["exact"])
    copies = list(vector.envs) if isinstance(vector, SyncVectorEnv) else []
    for i, copy in enumerate(copies):
        texts = _row(state["copies"], i)
        if not isinstance(copy, Recorded):
            restore(copy, texts)
        elif state["replay"] is not None:
            same = copy.replay(_row(state["replay"]["before"], i), state["replay"]["tapes"][i])
            exact = exact and same and capture(copy.env).texts == texts
    restore(vector, state["vector"])
    return exact


def _columns(rows: list[dict[str, str]]) -> dict[str, Any]:
    """Collect the texts of every path over the copies, [E]; a text that all share is kept once."""
    columns = {path: [row.get(path) for row in rows] for path in sorted(set().union(*rows))}
    return {path: column[0] if len(set(column)) == 1 else column for path, column in columns.items()}


def _row(columns: Mapping[str, Any], copy: int) -> dict[str, str]:
    """Return the texts of one copy by path."""
    row = {path: column if isinstance(column, str) else column[copy] for path, column in columns.items()}
    return {path: text for path, text in row.items() if text is not None}
