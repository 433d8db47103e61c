"""Names the environment in what goes wrong in its code: errors that it raises, numbers that are not finite.

Without these checks, such a number would appear much later as a gradient that is not finite, or as an advice.
"""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from tokenrl.errors import Refused, Stopped, describe


@contextlib.contextmanager
def refusing(env: str) -> Iterator[None]:
    """Refuse an environment if making it raises an error; keep gymnasium's warnings about it away.

    Raises:
        Refused: the environment needs a package that is not installed, or could not be made.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except gymnasium.error.DependencyNotInstalled as error:
        extra = 'pip install "gymnasium[box2d]"' if "box2d" in str(error).lower() else "see the message"
        raise Refused(f"{env} needs a package that is not installed ({error}). To mend: {extra}.") from error
    except Exception as error:  # raised by the environment
        raise Refused(f"The environment {env} could not be made: {raised(error)}.") from error


def raised(error: Exception) -> str:
    """Say in words what was raised and where, as 'it raised ValueError: no map (my_envs.py, line 7)'."""
    if isinstance(error, ImportError):  # the line is one of Python's own, and the message names the module
        return f"it raised {describe(error)}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"it raised {describe(error)} ({Path(last.filename).name}, line {last.lineno})"


def check_finite(
    env: str, observations: np.ndarray[Any, Any], rewards: np.ndarray[Any, Any], taken: int = 0
) -> None:
    """Stop at the first number of an episode, or of a piece of one, that is not finite.

    Args:
        env: id of the environment.
        observations: before each of T steps and after the last, [T + 1, ...].
        rewards: of the steps, [T].
        taken: steps of the episode before this piece.

    Raises:
        Stopped: a reward or an observation is nan or infinite; the message names it and the step.
    """
    flat = observations.reshape(len(observations), -1)
    seen, paid = ~np.isfinite(flat).all(1), ~np.isfinite(rewards)
    wrong = seen | np.concatenate([[False], paid])  # by the number of steps taken
    if not wrong.any():
        return
    step = int(wrong.argmax())
    if seen[step]:
        place = int((~np.isfinite(flat[step])).argmax())
        found = f"number {place} of the observation (counted from 0, flattened) was {flat[step, place]}"
    else:
        found = f"the reward was {rewards[step - 1]}"
    step += taken
    method, when = ("step", f"at step {step}") if step else ("reset", "at the start")
    raise Stopped(
        f"The environment {env} gave a number that is not finite: {when} of an episode {found}. Look for a "
        f"division by 0, a logarithm or an overflow in its {method}(), and return finite numbers, of 32 bits."
    )
