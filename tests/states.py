"""The state of a checkpoint as plain values, which two runs can be compared by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenrl.runs.checkpoint import read_state


def state_of(checkpoint: Path) -> Any:
    """Read the state that a checkpoint holds, with its tensors as lists, without times and places."""
    state = as_lists(read_state(checkpoint))
    for name in ("output_dir", "resume"):  # which may change when a run continues
        state["maker"]["settings"].pop(name, None)
    return state


def as_lists(state: Any) -> Any:
    """Return a state with its tensors as lists, which tell -0.0 and nan apart by their text."""
    if isinstance(state, dict):
        return {name: as_lists(value) for name, value in state.items() if "second" not in str(name)}
    if isinstance(state, list):
        return [as_lists(value) for value in state]
    return repr(state.tolist()) if hasattr(state, "tolist") else state
