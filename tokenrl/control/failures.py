"""Names the environment in what goes wrong in its code: errors that it raises, numbers that cannot be used.

Whatever it raises is its failure, `sys.exit` included. Without a check of its numbers, one that is not finite
or far too large would appear much later as a gradient that is not finite, or as an advice.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

from tokenrl.errors import Refused, Stopped
from tokenrl.settings import LARGEST_REWARD
from tokenrl.user_code import is_interrupt, marked_interrupts, raised


@contextlib.contextmanager
def refusing(env: str) -> Iterator[None]:
    """Refuse an environment if making it raises an error; keep gymnasium's warnings about it away.

    Raises:
        Refused: the environment needs a package that is not installed, or could not be made.
    """
    with marked_interrupts():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        except gymnasium.error.DependencyNotInstalled as error:
            extra = 'pip install "gymnasium[box2d]"' if "box2d" in str(error).lower() else "see the message"
            raise Refused(
                f"{env} needs a package that is not installed ({error}). To mend: {extra}."
            ) from error
        except BaseException as error:  # raised by the environment
            if is_interrupt(error):
                raise
            raise Refused(f"The environment {env} could not be made: {raised(error)}.") from error


def failed(env: str, method: str, error: BaseException, more: str = "") -> Stopped:
    """Return the error to raise for one that an environment raised; a Ctrl-C is raised on.

    Args:
        env: id of the environment.
        method: its method that was called, such as `step`.
        error: what came out of the method.
        more: a further sentence for the message.
    """
    if is_interrupt(error):
        raise error
    return Stopped(f"The environment {env} failed in {method}(): {raised(error)}.{more}")


def check_finite(
    env: str, observations: np.ndarray[Any, Any], rewards: np.ndarray[Any, Any], taken: int = 0
) -> None:
    """Stop at the first number of an episode, or of a piece of one, that is not finite or a too large reward.

    Args:
        env: id of the environment.
        observations: before each of T steps and after the last, [T + 1, ...].
        rewards: of the steps, [T].
        taken: steps of the episode before this piece.

    Raises:
        Stopped: a reward or an observation is nan or infinite, or the size of a reward is above
            `LARGEST_REWARD`; the message names it and the step.
    """
    flat = observations.reshape(len(observations), -1)
    seen = ~np.isfinite(flat).all(1)
    paid = ~(np.abs(rewards) <= LARGEST_REWARD)  # not `>`, which is False for nan
    wrong = seen | np.concatenate([[False], paid])  # by the number of steps taken
    if not wrong.any():
        return
    step = int(wrong.argmax())
    rule, remedy = "that is not finite", "finite numbers, of 32 bits"
    if seen[step]:
        place = int((~np.isfinite(flat[step])).argmax())
        found = f"number {place} of the observation (counted from 0, flattened) was {flat[step, place]}"
    else:
        found = f"the reward was {rewards[step - 1]:g}"
        if np.isfinite(rewards[step - 1]):
            rule, remedy = "that is too large", f"rewards from {-LARGEST_REWARD:g} to {LARGEST_REWARD:g}"
    step += taken
    method, when = ("step", f"at step {step}") if step else ("reset", "at the start")
    raise Stopped(
        f"The environment {env} gave a number {rule}: {when} of an episode {found}. Look for a "
        f"division by 0, a logarithm or an overflow in its {method}(), and return {remedy}."
    )


def close(env: str, vector: Any) -> None:
    """Close copies of an environment; an error then is only a warning: they are not needed any more."""
    try:
        vector.close()
    except BaseException as error:
        warnings.warn(str(failed(env, "close", error)), stacklevel=3)
