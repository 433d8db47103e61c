"""What a run refuses before its first step, and what stops it later: the words of a single paragraph."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tokenrl.errors import Refused, Stopped, TokenrlError


def refused(words: str):
    """A block that is refused before the first step, with words that match a pattern."""
    return ended(Refused, words)


def stopped(words: str):
    """A block in which a run stops, with words that match a pattern."""
    return ended(Stopped, words)


@contextmanager
def ended(kind: type[TokenrlError], words: str) -> Iterator[pytest.ExceptionInfo]:
    """A block that ends with an error of this kind, whose message is one paragraph."""
    with pytest.raises(kind, match=words) as caught:
        yield caught
    assert "\n" not in str(caught.value)
