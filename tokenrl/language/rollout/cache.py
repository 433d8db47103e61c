"""Holds the cache of a model (keys and values, recurrent states, or both), whatever its architecture."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenrl.errors import Refused
from tokenrl.language.rollout.rollout import to_device

try:
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
except ImportError:  # a release without them: no layer is replaced
    DynamicLayer = object  # type: ignore[assignment, misc]
    DynamicSlidingWindowLayer = object  # type: ignore[assignment, misc]


@dataclass(frozen=True)
class Cache:
    """The cache that a forward pass returned, and the name by which the model takes it back.

    Attributes:
        name: `cache` from transformers 5.24 on; before that `past_key_values`, or `cache_params` where a
            model keeps recurrent states and nothing else.
        held: a `transformers.Cache` of keys and values, of recurrent states, or of both.
    """

    name: str
    held: Any

    @classmethod
    def of(cls, out: Any) -> Cache:
        """Take the cache from the output of a forward pass with `use_cache`.

        Raises:
            Refused: the output holds none.
        """
        for name in ("cache", "past_key_values", "cache_params"):
            held = getattr(out, name, None)
            if held is not None:
                return cls(name, held)
        raise Refused(
            "The model returns no cache of the tokens that it was fed, so none can follow them."
        )

    @property
    def layers(self) -> list[Any]:
        """What holds the tokens, or the states, of each layer of the model; nothing in a cache of another kind."""
        layers: list[Any] = getattr(self.held, "layers", [])
        return layers

    def select(self, index: Tensor) -> None:
        """Make the rows `index` the new batch; a row may be chosen several times, or never."""
        # `batch_select_indices` would leave recurrent states as they are, or is missing where they are kept.
        self.held.reorder_cache(index)

    def make_room(self, tokens: int) -> None:
        """Set memory aside for more tokens, in layers that would otherwise copy all keys and values for each.

        Layers of other kinds, such as those of a sliding window or of recurrent states, stay as they are.
        """
        layers = self.layers
        for number, layer in enumerate(layers):
            if type(layer) is DynamicLayer and layer.keys is not None:
                length = layer.keys.shape[2]
                memory = [_with_room(x, tokens) for x in _tokens(layer)]
                layers[number] = Memory(memory, length)

    def keeps(self, columns: int) -> bool:
        """Whether every layer keeps each of so many tokens, or a state of them, so that rows can be taken out."""
        layers = self.layers
        return bool(layers) and all(map(_has_rows, layers)) and columns <= self.window

    def zeros(self, rows: int, columns: int, room: int) -> Cache:
        """Return a cache of the same kind that holds zeros.

        Args:
            rows: rows of keys, of values, and of states.
            columns: their tokens.
            room: further tokens for which memory is set aside.
        """
        held = copy.copy(self.held)
        held.layers = []
        for layer in self.layers:
            size = columns + room
            tokens = [x.new_zeros(rows, x.shape[1], size, x.shape[3]) for x in _tokens(layer)]
            if tokens and type(layer) in (DynamicLayer, Memory):
                held.layers.append(Memory(tokens, columns))
                continue
            blank = copy.copy(layer)
            for name, value in vars(layer).items():
                setattr(blank, name, _zeros(value, rows))
            if tokens:
                blank.keys, blank.values = (x[:, :, :columns] for x in tokens)
            if type(layer) is DynamicSlidingWindowLayer:
                blank.cumulative_length = columns
            held.layers.append(blank)
        return Cache(self.name, held)

    def put(self, rows: Tensor, source: Cache, index: Tensor, columns: Tensor) -> None:
        """Write over rows of this cache.

        Args:
            rows: numbers of n of its rows [n].
            source: a cache of the same kind.
            index: the rows of the source that are written [n].
            columns: the columns of the source that are written, for each row [n, columns].
        """
        for layer, of_source in zip(self.layers, source.layers, strict=True):
            for x, y in zip(_tokens(layer), _tokens(of_source), strict=True):
                heads = torch.arange(x.shape[1], device=x.device)[:, None]
                x[rows] = y[index[:, None, None], heads, columns[:, None]]
            for x, y in zip(_states(layer), _states(of_source), strict=True):
                x[rows] = y[index]

    @property
    def window(self) -> float:
        """The fewest tokens after which a layer drops some; infinity if none does."""
        windows = [getattr(layer, "sliding_window", math.inf) for layer in self.layers]
        return min(windows)

    @property
    def _tensors(self) -> list[Tensor]:
        """The keys, values and states of all layers."""
        return [x for layer in self.layers for x in (*_tokens(layer), *_states(layer))]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(x.nbytes for x in self._tensors)

    @property
    def columns(self) -> int:
        """Number of tokens of a row with its padding, or 0 if there are states only."""
        lengths = [x.shape[2] for layer in self.layers for x in _tokens(layer)]
        return max(lengths, default=0)

    @classmethod
    def joined(cls, rows: Sequence[tuple[Cache, int, int]], width: int, room: int) -> Cache:
        """Put copies of rows of caches one below the other, aligned on the right.

        Left of the tokens of a row are others, which a mask has to hide.

        Args:
            rows: n rows, each as a cache of the model, its row there, and the column behind the last token
                that is taken.
            width: the columns of the result.
            room: further tokens for which memory is set aside.
        """
        whole = rows[0][0].zeros(len(rows), width, room)
        device = whole._tensors[0].device
        caches: dict[int, tuple[Cache, list[tuple[int, int, int]]]] = {}
        for target, (cache, row, end) in enumerate(rows):
            caches.setdefault(id(cache), (cache, []))[1].append((target, row, end))
        for cache, table in caches.values():
            targets, index, ends = to_device(torch.tensor(table), device).T
            columns = ends[:, None] + torch.arange(-width, 0, device=device)
            whole.put(targets, cache, index, columns.clamp(min=0))
        return whole

    @property
    def recurrent(self) -> bool:
        """Whether some layer keeps a recurrent state, which each forward pass would overwrite."""
        return any(_is_recurrent(layer) for layer in self.layers)

    def keep_states(self) -> None:
        """Let the next forward pass read the recurrent states and leave them as they are.

        Backward needs their values, so nothing may be written over them.
        """
        for layer in filter(_is_recurrent, self.layers):
            layer.update_recurrent_state = _unwritten

    @property
    def takes_positions(self) -> bool:
        """Whether the model takes a mask and positions. States alone have left the padding out already."""
        layers = self.layers
        return self.name != "cache_params" and (not layers or any(map(_tokens, layers)))

    def arguments(self, positions: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the next forward pass: this cache, the mask and the positions if it takes them."""
        return {self.name: self.held, **(positions if self.takes_positions else {})}


class Memory(DynamicLayer):
    """Keys and values of t tokens, in memory that has room for more; without autograd.

    It overrides all methods that a forward pass calls, so that it does not rely on attributes that a release
    may rename.

    Attributes:
        whole: the memory of keys and of values, each [n, heads, room, d].
        length: t.
    """

    whole: list[Tensor]
    length: int

    def __init__(self, whole: list[Tensor], length: int) -> None:
        """Take memory of keys and of values, of which the first `length` tokens are written."""
        self.is_initialized = True
        self.dtype = whole[0].dtype
        self.device = whole[0].device
        self.whole = whole
        self.length = length

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """The keys of all tokens so far [n, heads, t, d], a view."""
        return self.whole[0][:, :, : self.length]

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """Their values, alike."""
        return self.whole[1][:, :, : self.length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the keys and values of the next tokens, and return those of all tokens so far."""
        start = self.length
        self.length += key_states.shape[2]
        for whole, x in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, start : self.length] = x
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return t."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that the next tokens can look at, and the position of the first."""
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make the rows `beam_idx` the new batch."""
        room = self.whole[0].shape[2] - self.length
        rows = [x.index_select(0, beam_idx) for x in (self.keys, self.values)]
        self.whole = [_with_room(x, room) for x in rows]


def positions_of(mask: Tensor | None, count: int) -> dict[str, Tensor]:
    """Return a mask that is padded on the left, and the positions of its last tokens; nothing without a mask."""
    if mask is None:
        return {}
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions[:, -count:]}


def _has_rows(layer: Any) -> bool:
    """Whether a layer has rows of tokens, or of states alone."""
    if _is_recurrent(layer):
        return not getattr(layer, "is_sliding", False)
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, Memory)


def _tokens(layer: Any) -> list[Tensor]:
    """Return keys and values of a layer [n, heads, t, d]; nothing if it has states only."""
    keys = getattr(layer, "keys", None)
    return [] if keys is None else [keys, layer.values]


def _states(layer: Any) -> list[Tensor]:
    """Return the states of a layer [n, ...], in the order of its attributes."""
    states = []
    for name, value in vars(layer).items():
        values = value.values() if isinstance(value, dict) else [value]
        if name not in ("keys", "values"):
            states += [x for x in values if isinstance(x, Tensor) and x.ndim > 1]
    return states


def _zeros(value: Any, rows: int) -> Any:
    """Return zeros for so many rows in place of the states that an attribute of a layer holds, and else the value."""
    if isinstance(value, dict):
        return {key: _zeros(x, rows) for key, x in value.items()}
    if isinstance(value, Tensor) and value.ndim > 1:
        return value.new_zeros(rows, *value.shape[1:])
    return value


def _with_room(x: Tensor, room: int) -> Tensor:
    """Return a copy of keys or of values with room for more tokens, which takes no memory before it is used."""
    rows, heads, length, size = x.shape
    whole = x.new_empty(rows, heads, length + room, size)
    whole[:, :, :length] = x
    return whole


def _is_recurrent(layer: Any) -> bool:
    return hasattr(layer, "update_recurrent_state")


def _unwritten(states: Tensor, *_: Any, **__: Any) -> Tensor:
    return states
