"""The state of a checkpoint as plain values, by which two runs are compared to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokenrl.runs.checkpoint import read_state


def state_of(checkpoint: Path) -> Any:
    """Read the state that a checkpoint holds, with the bits of its tensors, without times and places."""
    state = as_bits(read_state(checkpoint))
    for name in ("output_dir", "resume"):  # which may change when a run continues
        state["maker"]["settings"].pop(name, None)
    return state


def as_bits(state: Any) -> Any:
    """Return a state with the bits of its tensors, which tell -0.0 from 0.0 and hold nan equal to nan."""
    if isinstance(state, dict):
        return {name: as_bits(value) for name, value in state.items() if "second" not in str(name)}
    if isinstance(state, list | tuple):
        return [as_bits(value) for value in state]
    if not isinstance(state, torch.Tensor):
        return type(state), repr(state)
    if not state.numel():
        return str(state.dtype), state.shape
    bits = state.detach().contiguous().flatten().view(torch.uint8)
    return str(state.dtype), state.shape, bits.numpy().tobytes()
