"""What a run refuses before its first step, and what stops it later: the words of a single paragraph."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tokenrl.errors import Refused, Stopped


@contextmanager
def refused(words: str) -> Iterator[pytest.ExceptionInfo]:
    """A block that is refused before the first step, in one paragraph that matches these words."""
    with pytest.raises(Refused, match=words) as caught:
        yield caught
    assert "\n" not in str(caught.value)


@contextmanager
def stopped(words: str) -> Iterator[pytest.ExceptionInfo]:
    """A block in which a run stops, in one paragraph that matches these words."""
    with pytest.raises(Stopped, match=words) as caught:
        yield caught
    assert "\n" not in str(caught.value)
