"""Names the environment in errors that its code raises. Whatever it raises is its failure, sys.exit too."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium

from tokenrl.errors import USER_CODE_FAILED, Refused, Stopped, raised


@contextlib.contextmanager
def refusing(env: str) -> Iterator[None]:
    """Refuse an environment if making it raises an error; keep gymnasium's warnings about it away.

    Raises:
        Refused: the environment needs a package that is not installed, or could not be made.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except gymnasium.error.DependencyNotInstalled as error:
            raise Refused(f"{env} needs a package that is not installed: {error}") from error
        except USER_CODE_FAILED as error:
            raise Refused(f"The environment {env} could not be made: {raised(error)}.") from error


def failed(env: str, method: str, error: BaseException) -> Stopped:
    """Return the error to raise for one that came out of a method of an environment."""
    return Stopped(f"The environment {env} failed in {method}(): {raised(error)}.")


def close(env: str, vector: Any) -> None:
    """Close copies of an environment; an error then is only a warning: they are not needed any more."""
    try:
        vector.close()
    except USER_CODE_FAILED as error:
        warnings.warn(str(failed(env, "close", error)), stacklevel=3)
