"""Copies a state as a checkpoint would, and compares states bit for bit."""

import json
import tempfile
from pathlib import Path

import torch

from tokenrl.runs.checkpoint import read_state, write_state


def through_a_checkpoint(state):
    """A copy of a state; what a checkpoint cannot hold is refused."""
    with tempfile.TemporaryDirectory() as folder:
        write_state(Path(folder), {"state": state}, "this test")
        return read_state(Path(folder))["state"]


def equal(first, second) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype
        return same and first.shape == second.shape and bytes_of(first) == bytes_of(second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            equal(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and json.dumps(first) == json.dumps(second)


def bytes_of(tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
