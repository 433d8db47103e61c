"""Copies a state as a checkpoint would, and compares states bit for bit."""

import json

import torch


def through_a_checkpoint(state, *, inside_list=False):
    """A copy of a state; what a checkpoint cannot hold is refused."""
    if isinstance(state, torch.Tensor):
        assert not inside_list, "a list holds plain values only"
        return state.detach().clone()
    if isinstance(state, dict):
        assert all(type(key) is str for key in state), state.keys()
        return {key: through_a_checkpoint(value) for key, value in state.items()}
    if isinstance(state, list):
        return [through_a_checkpoint(value, inside_list=True) for value in state]
    assert state is None or type(state) in (bool, int, float, str), type(state)
    return json.loads(json.dumps(state))


def equal(first, second) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        same = isinstance(second, torch.Tensor) and first.dtype == second.dtype
        return same and first.shape == second.shape and bytes_of(first) == bytes_of(second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and json.dumps(first) == json.dumps(second)


def bytes_of(tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
