"""What a run refuses before its first step, and what stops it later: the words of a single paragraph."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from tokenrl.errors import Refused, Stopped, TokenrlError


@contextmanager
def refused(words: str, kind: type[TokenrlError] = Refused) -> Iterator[pytest.ExceptionInfo]:
    """A block that is refused before the first step, in one paragraph that matches these words."""
    with pytest.raises(kind, match=words) as caught:
        yield caught
    assert "\n" not in str(caught.value)


stopped = partial(refused, kind=Stopped)
"""A block in which a run stops, in one paragraph that matches some words."""
