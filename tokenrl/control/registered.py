"""Finds environments by name: those of tokenrl, of gymnasium, and those that a user's file registers."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from tokenrl.errors import Refused, nearest, suggest
from tokenrl.names import import_source

OWN: dict[str, dict[str, Any]] = {
    "gridworld": {
        "id": "tokenrl/GridWorld-v0",
        "entry_point": "tokenrl.control.worlds.gridworld:GridWorld",
        "max_episode_steps": 50,
        "reward_threshold": 0.93,  # the return of a path one step longer than the shortest
        "kwargs": {"time_limit": None},  # gymnasium's wrapper truncates episodes
    },
    "trap": {
        "id": "tokenrl/Trap-v0",
        "entry_point": "tokenrl.control.worlds.gridworld:GridWorld",
        "max_episode_steps": 50,
        "reward_threshold": 0.8,  # between the return of the decoy, 0.49, and that of the goal, at most 0.9
        "kwargs": {"size": 6, "decoy": 1, "decoy_reward": 0.5, "time_limit": None},
    },
    "walk": {
        "id": "tokenrl/Walk-v0",
        "entry_point": "tokenrl.control.worlds.walk:Walk",
        "max_episode_steps": 50,
        "reward_threshold": 1.1,  # the return of the straight path
        "kwargs": {"time_limit": None},
    },
    "costly_walk": {
        "id": "tokenrl/CostlyWalk-v0",
        "entry_point": "tokenrl.control.worlds.walk:Walk",
        "max_episode_steps": 50,
        "reward_threshold": 0.88,  # the return of a path two steps longer than the shortest
        "kwargs": {"time_limit": None, "step_reward": -0.01},
    },
    "bandit": {
        "id": "tokenrl/Bandit-v0",
        "entry_point": "tokenrl.control.worlds.bandit:Bandit",
        "max_episode_steps": 1,
    },
}
"""The environments of tokenrl by their short names, with the arguments to register them in gymnasium."""

for _own in OWN.values():
    if _own["id"] not in gymnasium.registry:
        gymnasium.register(**_own)


def find(env: str) -> EnvSpec:
    """Look an environment up in gymnasium's registry.

    Args:
        env: a name in `OWN`, the id of a gymnasium environment, or that of one which a file or module
            registers: `path/to/file.py:id` or `package.module:id`. It is imported once in a process; a
            module may lie in the current directory.

    Raises:
        Refused: there is no environment of that name, or the file or module cannot be imported.
    """
    if not isinstance(env, str):
        raise Refused(f"env was given as a {type(env).__name__}; give the id under which it is registered.")
    source, _, name = OWN.get(env, {"id": env})["id"].rpartition(":")
    added = _import(str(Path(source).resolve()) if source.endswith(".py") else source) if source else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about older versions: the id given is used
            return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        if added is not None:
            hint = suggest(name, added) if added else f" Call gymnasium.register({name!r}, ...) in it."
            raise Refused(f"env '{env}': {source} registers no environment {name!r}.{hint}") from error
        reason = str(error).partition(" Did you mean")[0].rstrip(".")
        raise Refused(
            f"There is no environment {env!r} ({reason}).{nearest(name, [*OWN, *gymnasium.registry])} Give a "
            "gymnasium id with its version, such as CartPole-v1, Acrobot-v1 or LunarLander-v3, one of "
            f"{', '.join(OWN)}, or your own, as my_envs.py:Mine-v0 if my_envs.py registers Mine-v0."
        ) from error


@cache
def _import(source: str) -> list[str]:
    """Import a file or module once; return the ids that it registered."""
    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Overriding environment")  # imported before by another name
        import_source(source, "env")
    return [name for name, spec in gymnasium.registry.items() if before.get(name) is not spec]
