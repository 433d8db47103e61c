"""Writes the state of a training to two files, and reads it back bit for bit, without pickle.

trainer_state.json holds the plain values, trainer_state.safetensors the tensors and arrays. JSON has no NaN
and no infinity, so those stand there by their names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenrl.errors import Refused
from tokenrl.runs.files import write_text

_PLAIN, _TENSORS = "trainer_state.json", "trainer_state.safetensors"
_FLOAT, _TENSOR, _ARRAY = "<float>", "<tensor>", "<array>"
"""Keys of the only entry of a dict that stands for something else in JSON."""
_VALUES = frozenset({float, int, bool, str, type(None)})


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write a state into an existing folder.

    Args:
        folder: gets the two files.
        state: plain values, also NaN and integers of any size; tensors; numpy arrays; and dicts with text as
            keys and lists of all these. A tuple becomes a list. A function stands for what it returns: it
            is called now, so that what takes long to find is found only if it is written.

    Raises:
        TypeError: the state holds something else.
        Stopped: a file could not be written.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(state, "", tensors), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / _PLAIN, text + "\n")
    save_file(tensors, folder / _TENSORS)


def read_state(folder: Path) -> dict[str, Any]:
    """Read what `write_state` wrote; tensors are on the CPU.

    Raises:
        Refused: the files are missing or damaged.
    """
    try:
        packed = json.loads((folder / _PLAIN).read_text(encoding="utf-8"))
        state: dict[str, Any] = _unpacked(packed, load_file(folder / _TENSORS))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise Refused(
            f"{folder} holds no state from which a run can continue ({error}). Give another checkpoint, or "
            "start a new run from its weights with --model."
        ) from error
    return state


def frozen(state: Any) -> Any:
    """Copy a state, but not its tensors; `versions` tells whether those have changed since."""
    if isinstance(state, Mapping):
        return {key: frozen(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return list(state) if _is_flat(state) else [frozen(value) for value in state]
    return state.copy() if isinstance(state, np.ndarray) else state


def versions(state: Any) -> list[int]:
    """Return how often each tensor of a state has been changed in place, as PyTorch counts it."""
    if isinstance(state, Tensor):
        return [state._version]
    if isinstance(state, Mapping):
        state = list(state.values())
    nested = state if isinstance(state, list) and not _is_flat(state) else []
    return [version for value in nested for version in versions(value)]


def _is_flat(values: Sequence[Any]) -> bool:
    """Return whether a list holds plain values alone; some have one for each step, so this must be quick."""
    return _VALUES.issuperset(map(type, values))


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    value = value() if callable(value) else value
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, np.ndarray):
        tensors[name] = torch.from_numpy(np.ascontiguousarray(value))
        return {_ARRAY: [name, list(value.shape)]}  # of an array without axes, contiguity makes one
    if isinstance(value, float) and not math.isfinite(value):
        return {_FLOAT: str(value)}
    if isinstance(value, Mapping):
        wrong = [key for key in value if not isinstance(key, str)]
        if wrong:
            raise TypeError(f"the state {name or '(top)'} has the key {wrong[0]!r}, which is no text")
        return {key: _packed(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_packed(item, f"{name}/{number}", tensors) for number, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"the state {name} is a {type(value).__name__}, which a checkpoint cannot hold")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        (key, item), *_ = value.items()
        if key == _TENSOR:
            return tensors[item]
        if key == _ARRAY:
            return tensors[item[0]].numpy().reshape(item[1])
        if key == _FLOAT:
            return float(item)
    return {key: _unpacked(item, tensors) for key, item in value.items()}
