"""Holds the cache of a model (keys and values, recurrent states, or both), whatever its architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenrl.errors import Refused

try:
    from transformers.cache_utils import DynamicLayer
except ImportError:  # a release without it: no layer is replaced
    DynamicLayer = object  # type: ignore[assignment, misc]


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

    def select(self, index: Tensor) -> None:
        """Make the rows `index` the new batch; a row may be chosen several times, or never."""
        # `batch_select_indices` would leave recurrent states as they are, or is missing where they are kept.
        self.held.reorder_cache(index)

    def make_room(self, tokens: int) -> None:
        """Set memory aside for more tokens, in layers that would otherwise copy all keys and values for each.

        Layers of other kinds, such as those of a sliding window or of recurrent states, stay as they are.
        """
        layers: Any = getattr(self.held, "layers", [])
        for number, layer in enumerate(layers):
            if type(layer) is DynamicLayer and layer.keys is not None:
                layers[number] = GrowingLayer(layer, tokens)

    @property
    def recurrent(self) -> bool:
        """Whether some layer keeps a recurrent state, which each forward pass would overwrite."""
        return any(_is_recurrent(layer) for layer in self.held.layers)

    def keep_states(self) -> None:
        """Let the next forward pass read the recurrent states and leave them as they are.

        Backward needs their values, so nothing may be written over them.
        """
        for layer in filter(_is_recurrent, self.held.layers):
            layer.update_recurrent_state = _unwritten

    def arguments(self, positions: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of the next forward pass: this cache, with the mask and the positions.

        A model of recurrent states alone takes neither, because its states already leave the padding out.
        """
        layers: Any = getattr(self.held, "layers", [])
        has_keys = not layers or any(getattr(layer, "keys", None) is not None for layer in layers)
        if self.name == "cache_params" or not has_keys:
            return {self.name: self.held}
        return {self.name: self.held, **positions}


class GrowingLayer(DynamicLayer):
    """Keys and values of t tokens, in memory that has room for more; without autograd.

    Of the layer whose place it takes it reads the keys and the values only, and it overrides all methods that
    a forward pass calls, so that it does not rely on attributes that a release may rename.

    Attributes:
        whole: the memory of keys and of values, each [n, heads, room, d].
        length: t.
    """

    whole: list[Tensor]
    length: int

    def __init__(self, layer: DynamicLayer, tokens: int) -> None:
        """Take over what a layer holds, and set aside memory for `tokens` more."""
        assert layer.keys is not None and layer.values is not None
        self.is_initialized = True
        self.dtype = layer.keys.dtype
        self.device = layer.keys.device
        self._hold(layer.keys, layer.values, layer.keys.shape[2] + tokens)

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
        self.whole[0][:, :, start : self.length] = key_states
        self.whole[1][:, :, start : self.length] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return t."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of keys that the next tokens can look at, and the position of the first."""
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make the rows `beam_idx` the new batch."""
        room = self.whole[0].shape[2]
        self._hold(self.keys[beam_idx], self.values[beam_idx], room)

    def _hold(self, keys: Tensor, values: Tensor, room: int) -> None:
        self.whole = []
        for x in (keys, values):
            n, heads, _, size = x.shape
            self.whole.append(x.new_empty(n, heads, room, size))
        self.length = 0
        self.update(keys, values)


def _is_recurrent(layer: Any) -> bool:
    return hasattr(layer, "update_recurrent_state")


def _unwritten(states: Tensor, *_: Any, **__: Any) -> Tensor:
    return states
