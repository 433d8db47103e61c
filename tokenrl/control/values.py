"""Writes the values of attributes as JSON texts that are read back bit for bit, random generators included.

JSON holds None, bools, whole numbers of any size, floats, texts and lists. Everything else is a dict with one
entry, whose name is the kind of the value.
"""

from __future__ import annotations

import json
import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

PLAIN = (type(None), bool, int, float, str)
CONTAINERS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset}
CHANGING = (list, dict, set, deque)
"""Containers that could hold each other in a circle; no reference to them is written inside another."""
STREAMS: dict[str, Any] = {
    name: getattr(np.random, name) for name in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
}
"""The random streams of NumPy that are read back, by name."""


class Hidden(Exception):
    """A value holds something that cannot be written."""


class Writer:
    """Writes the attributes of one environment.

    An object that is the value of two attributes, or that a list holds beside, is written once, so that it is
    one object again when it is read. Where that is not possible the value is `Hidden`.
    """

    def __init__(self, attributes: Mapping[str, Any]) -> None:
        """Take all attributes by path, because they may share objects; `referred` will tell to which."""
        self._paths: dict[int, str] = {}
        for path, value in attributes.items():
            if type(value) not in PLAIN:
                self._paths.setdefault(id(value), path)
        self.referred: set[str] = set()  # paths to whose values other texts refer
        self._inner: set[int] = set()
        self._memory: set[int] = set()  # of arrays: two that share memory would no longer do so

    def attribute(self, path: str, value: Any) -> str:
        """Return the text of one attribute.

        Raises:
            Hidden: the value cannot be written.
        """
        first = self._paths.get(id(value), path)
        alone = first == path or isinstance(value, tuple)
        return json.dumps(self._form(value) if alone else self._same(first))

    def text(self, value: Any) -> str:
        """Return the text of a value that belongs to no attribute; see `attribute`."""
        return json.dumps(self._form(value))

    def _value(self, value: Any) -> Any:
        """Return the form of a value inside another."""
        if type(value) in PLAIN:
            return value
        if not isinstance(value, (tuple, frozenset, np.generic)):
            if id(value) in self._inner or (id(value) in self._paths and type(value) in CHANGING):
                raise Hidden
            if id(value) in self._paths:
                return self._same(self._paths[id(value)])
            self._inner.add(id(value))
        return self._form(value)

    def _same(self, path: str) -> Any:
        self.referred.add(path)
        return {"same": path}

    def _form(self, value: Any) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if kind is list:
            return [self._value(item) for item in value]
        if kind is dict:
            return {"dict": [[self._value(key), self._value(item)] for key, item in value.items()]}
        if kind is deque:
            return {"deque": [value.maxlen, [self._value(item) for item in value]]}
        if CONTAINERS.get(kind.__name__) is kind:
            return {kind.__name__: [self._value(item) for item in value]}
        if kind is np.ndarray or isinstance(value, np.generic):
            return self._array(value)
        if kind is np.random.Generator and type(value.bit_generator).__name__ in STREAMS:
            return {"generator": _state(value.bit_generator.state)}
        if kind is np.random.RandomState:
            return {"random_state": _state(value.get_state(legacy=False))}
        if kind is random.Random:
            return {"random": _state(value.getstate())}
        raise Hidden

    def _array(self, value: Any) -> Any:
        if value.dtype.hasobject or value.dtype.names:
            raise Hidden
        if isinstance(value, np.generic):
            return {"number": [value.dtype.str, value.tobytes().hex()]}
        memory = id(value if value.base is None else value.base)
        if memory in self._memory:
            raise Hidden
        self._memory.add(memory)
        order = "F" if value.flags.fnc else "C"  # sums round by the order in memory
        return {"array": [value.dtype.str, value.shape, order, value.tobytes(order).hex()]}


def _state(state: Any) -> Any:
    """Return the form of a random generator's state."""
    return Writer({})._form(state)


class Reader:
    """Reads the attributes that a `Writer` has written, for another environment of the same kind."""

    def __init__(self, texts: Mapping[str, str], now: Mapping[str, Any]) -> None:
        """Take the texts by path, and the present values, whose random generators get the saved states."""
        self._texts, self._now = texts, now
        self._read: dict[str, Any] = {}

    def attribute(self, path: str) -> Any:
        """Return the value of one attribute."""
        if path not in self._read:
            self._read[path] = self.value(json.loads(self._texts[path]), self._now.get(path))
        return self._read[path]

    def value(self, form: Any, now: Any = None) -> Any:
        """Return the value of a form. A random generator `now` gets the saved state and remains the same."""
        if isinstance(form, list):
            return [self.value(item) for item in form]
        if not isinstance(form, dict):
            return form
        ((kind, content),) = form.items()
        if kind == "same":
            return self.attribute(content)
        if kind == "dict":
            return {self.value(key): self.value(item) for key, item in content}
        if kind == "deque":
            return deque(self.value(content[1]), content[0])
        if kind in CONTAINERS:
            return CONTAINERS[kind](self.value(content))
        if kind == "number":
            return np.frombuffer(bytes.fromhex(content[1]), content[0])[0]
        if kind == "array":
            dtype, shape, order, data = content
            return np.frombuffer(bytes.fromhex(data), dtype).reshape(shape, order=order).copy(order)
        return self._generator(kind, self.value(content), now)

    def _generator(self, kind: str, state: Any, now: Any) -> Any:
        if kind == "random":
            drawn = now if type(now) is random.Random else random.Random()
            drawn.setstate(state)
            return drawn
        if kind == "random_state":
            old = now if type(now) is np.random.RandomState else np.random.RandomState()
            old.set_state(state)
            return old
        stream = STREAMS[state["bit_generator"]]
        fits = type(now) is np.random.Generator and type(now.bit_generator) is stream
        generator = now if fits else np.random.Generator(stream())
        generator.bit_generator.state = state
        return generator
