"""Copies a state as a checkpoint would, and compares states bit for bit."""

import tempfile
from pathlib import Path

from tests.states import as_bits
from tokenrl.runs.checkpoint import read_state, write_state


def through_a_checkpoint(state):
    """A copy of a state; what a checkpoint cannot hold is refused."""
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder), {"state": state}, "this test")
        return read_state(Path(folder))["state"]


def equal(first, second) -> bool:
    """Whether two states are equal bit for bit."""
    return repr(as_bits(first)) == repr(as_bits(second))
