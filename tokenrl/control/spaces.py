"""Says which spaces of gymnasium an agent can work with, and how long a vector each of them gives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from tokenrl.errors import Refused

PICTURE = 1024
"""A Box with several axes is a picture if its numbers are bytes (uint8), or if they are more than these.

Pictures are refused: flattened, they would be thousands of inputs that do not know which of them are
neighbours. A smaller Box of other numbers is a table of features, which is flattened. A Box with one axis is
never a picture, so that `gymnasium.wrappers.FlattenObservation` still lets a user flatten any Box.
"""
REGISTER = "Write a file that registers it in a wrapper{}, and give it as --env my_envs.py:Mine-v0."


def observation_size(env: str, space: spaces.Space[Any]) -> int:
    """Return the length O of an observation as a vector: a Box is flattened, a Discrete is one-hot.

    Raises:
        Refused: the observations are pictures, or neither a Box nor a Discrete.
    """
    if isinstance(space, spaces.Box) and _is_picture(space):
        shape, size = " x ".join(map(str, space.shape)), math.prod(space.shape)
        raise Refused(
            f"Observations of {env} are pictures (Box, shape {shape}, dtype {space.dtype}), and the policies "
            "here have no convolutional layers: they take vectors and small tables of features. "
            + REGISTER.format(" that returns features instead (gymnasium.wrappers.TransformObservation)")
            + " Atari games have obs_type='ram' for this. If the numbers are no picture, the wrapper "
            f"gymnasium.wrappers.FlattenObservation makes a vector of all {size:,}."
        )
    if isinstance(space, (spaces.Box, spaces.Discrete)):
        return int(spaces.flatdim(space))
    raise Refused(
        f"Observations of {env} are of kind {type(space).__name__}; supported are Box (flattened) and "
        "Discrete (one-hot). "
        + REGISTER.format(" that returns one of these, such as gymnasium.wrappers.FlattenObservation")
    )


def action_size(env: str, space: spaces.Space[Any]) -> int:
    """Return the length D of an action: 0 for a Discrete, that of its axis for a Box of real numbers.

    Raises:
        Refused: the actions are of another kind, or the Box has whole numbers or not exactly one axis.
    """
    if isinstance(space, spaces.Discrete):
        return 0
    real = isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating)
    if real and len(space.shape or ()) == 1:
        return int(spaces.flatdim(space))
    raise Refused(
        f"Actions of {env} are {space!s:.200}; supported are Discrete, and a Box of real numbers with one "
        "axis. " + REGISTER.format(" that takes one of these, such as gymnasium.wrappers.TransformAction")
    )


def _is_picture(space: spaces.Box) -> bool:
    return len(space.shape) > 1 and (space.dtype == np.uint8 or math.prod(space.shape) > PICTURE)
