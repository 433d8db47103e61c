"""Samples tokens in memory that keeps its address, so that a GPU can replay a token-step as one CUDA graph.

A token-step feeds each row its last token and draws the next one. Launched one by one, its operations (some
hundred) take a GPU longer to be started than to be computed. Here they read and write buffers
only, and the device counts positions, so that the host is asked for nothing and the whole is started at once.
Buffers come in sizes (buckets): a batch takes the smallest that holds it, and a smaller one when rows have ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tokenrl.language.rollout.cache import Cache, FixedLayer
from tokenrl.language.rollout.decoder import Decoder, drawn, forward

WINDOW = 8
"""The most tokens that are sampled before the host looks at them."""
LEAST_COLUMNS = 64
LIMIT = 4 * 2**30
"""Bytes that all buffers may take. A batch that alone needs more is sampled without them."""


class TokenStep:
    """The buffers of R rows of at most L tokens, and the token-step that works on them.

    Attributes:
        cache: keys and values, with layers of R rows and L columns.
        mask: True on the columns that are read [R, 1, 1, L].
        column: where the next token is written [1].
        position: number of tokens of each row that were read; rows that no completion uses begin at 0 [R, 1].
        token: the last token of each row [R].
        alive: True for the rows that have not ended [R].
        uniforms: random numbers of the tokens of a window [R, WINDOW]; None to take the most probable tokens.
        slot: the next token in the window [1].
        columns: what was sampled in the window, as `Decoder.sample` returns it, each [R, WINDOW, ...].
        replay: computes the token-step, on a CUDA device as a graph.
    """

    replay: Callable[[], None]

    def __init__(self, decoder: Decoder, rows: int, columns: int, uniforms: Tensor | None) -> None:
        """Make buffers for batches like that of a decoder, and capture the token-step.

        Args:
            decoder: the state of such a batch.
            rows: R.
            columns: L.
            uniforms: random numbers [n, t], of which only the type counts; None for greedy completions.
        """
        self._model = decoder.model
        self._sampling = decoder.sampling
        self._eos = decoder.eos
        position = decoder.position
        self.column = position.new_zeros(1)
        self.slot = position.new_zeros(1)
        self.position = position.new_zeros(rows, 1)
        self.token = position.new_zeros(rows)
        self.alive = decoder.alive.new_zeros(rows)
        self.mask = decoder.alive.new_zeros(rows, 1, 1, columns)
        self.cache = decoder.cache.fixed(rows, columns, self.column)
        self.uniforms = None if uniforms is None else uniforms.new_zeros(rows, WINDOW)
        hidden = None if decoder.hidden is None else decoder.hidden[:1]
        first = None if uniforms is None else uniforms[:1, 0]
        like = drawn(self._sampling, decoder.logits[:1], hidden, first) | {
            "mask": decoder.alive[:1]
        }
        self.columns = {}
        for name, x in like.items():
            self.columns[name] = x.new_zeros(rows, WINDOW, *x.shape[1:])
        self.replay = self._compute
        if self.token.is_cuda:
            self.replay = _captured(self._compute)

    @property
    def tensors(self) -> list[Tensor]:
        """The buffers of the state of each row, in the same order for every bucket."""
        layers: list[FixedLayer] = self.cache.held.layers
        of_layers = [x for layer in layers for x in (layer.keys, layer.values)]
        return [*of_layers, self.mask, self.position, self.token, self.alive]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(x.nbytes for x in chain(self.tensors, self.columns.values()))

    def load(self, decoder: Decoder) -> None:
        """Take over the n rows of a decoder, whose last token was drawn and not read yet."""
        n = len(decoder.alive)
        for layer, source in zip(self.cache.held.layers, decoder.cache.held.layers, strict=True):
            width = source.keys.shape[2]
            layer.keys[:n, :, :width] = source.keys
            layer.values[:n, :, :width] = source.values
        self.mask.fill_(False)
        self.mask[:n, 0, 0, :width] = True if decoder.mask is None else decoder.mask
        self.column.fill_(width)
        self.position[:n, 0] = decoder.position
        self.position[n:] = 0
        if decoder.token is not None:
            self.token[:n] = decoder.token
        self.alive[:n] = decoder.alive

    def move(self, source: TokenStep, index: Tensor) -> None:
        """Take over the rows `index` of another bucket, or of this one."""
        for x, y in zip(self.tensors, source.tensors, strict=True):
            x[: len(index)] = y[index]
        self.position[len(index) :] = 0
        self.column.copy_(source.column)

    def _compute(self) -> None:
        """Read the last token of each row, draw the next one, and write down what `drawn` returns."""
        self.mask.index_fill_(3, self.column, True)
        positions = {"attention_mask": self.mask, "position_ids": self.position}
        arguments = self.cache.arguments(positions)
        _, last = forward(self._model, self._sampling, self.token[:, None], **arguments)
        uniforms = None
        if self.uniforms is not None:
            uniforms = self.uniforms.index_select(1, self.slot).squeeze(1)
        numbers = drawn(self._sampling, last.logits, last.hidden, uniforms)
        for name, x in {**numbers, "mask": self.alive}.items():
            self.columns[name].index_copy_(1, self.slot, x[:, None])
        self.token.copy_(numbers["ids"])
        self.alive.logical_and_(~torch.isin(self.token, self._eos))
        for counter in (self.column, self.position, self.slot):
            counter.add_(1)


class TokenSteps:
    """The buckets of a run, which are made when they are first needed."""

    def __init__(self, limit: int = LIMIT) -> None:
        """Begin without buckets; they may take `limit` bytes, and are dropped where another needs their room."""
        self._limit = limit
        self._steps: dict[Any, TokenStep] = {}

    def __len__(self) -> int:
        """Return the number of buckets."""
        return len(self._steps)

    def bucket(
        self, decoder: Decoder, rows: int, columns: int, uniforms: Tensor | None
    ) -> TokenStep | None:
        """Return the smallest bucket that holds so many rows and columns; None if it needs too much memory."""
        rows = _rounded(rows)
        sampling = replace(
            decoder.sampling, max_completion_length=1, num_generations=1, seed=0, step=0
        )
        # A graph reads the weights where they were when it was captured.
        weights = chain(decoder.model.parameters(), decoder.model.buffers())
        addresses = tuple(x.data_ptr() for x in weights)
        key = rows, columns, sampling, uniforms is None, decoder.eos_ids, decoder.model, addresses
        if key not in self._steps:
            step = TokenStep(decoder, rows, columns, uniforms)
            if step.nbytes > self._limit:
                return None
            if step.nbytes + sum(bucket.nbytes for bucket in self._steps.values()) > self._limit:
                self._steps.clear()
            self._steps[key] = step
        return self._steps[key]

    def decoder(
        self, state: Decoder, tokens: int, uniforms: Tensor | None
    ) -> Decoder | FixedDecoder:
        """Return what samples on from a state, in a bucket if its cache and the memory allow it.

        Args:
            state: the state behind the prompts.
            tokens: the most tokens of a prompt and its completion.
            uniforms: random numbers [n, T]; None for greedy completions.
        """
        columns = LEAST_COLUMNS
        while columns < tokens:
            columns *= 2
        step = None
        if state.cache.keeps(columns):
            step = self.bucket(state, len(state.alive), columns, uniforms)
        return state if step is None else FixedDecoder(self, state, step, uniforms)


class FixedDecoder:
    """Samples on in the buckets of `TokenSteps`, with those methods and attributes of `Decoder` that this needs."""

    def __init__(
        self, steps: TokenSteps, decoder: Decoder, step: TokenStep, uniforms: Tensor | None
    ) -> None:
        """Let a decoder sample the first token of its rows, and load them into a bucket.

        One row of the decoder is kept as a pattern of further buckets.
        """
        self._steps = steps
        self._step = step
        self._rows = len(decoder.alive)
        self._pattern = decoder
        self._first = decoder.sample(None if uniforms is None else uniforms[:, :1], 1)
        step.load(decoder)
        decoder.select(step.slot.new_zeros(1))

    @property
    def alive(self) -> Tensor:
        """True for the rows that have not ended [n]."""
        return self._step.alive[: self._rows]

    @property
    def cache(self) -> Cache:
        """The cache, whose first n rows are those of the batch."""
        return self._step.cache

    def sample(self, uniforms: Tensor | None, count: int) -> dict[str, Tensor]:
        """Sample the next tokens of each row, as `Decoder.sample` does."""
        step = self._step
        step.slot.zero_()
        before = self._first
        self._first = {}
        start = 1 if before else 0
        if step.uniforms is not None and uniforms is not None:
            step.uniforms[: self._rows, : count - start] = uniforms[:, start:]
        for _ in range(start, count):
            step.replay()
        columns = {name: x[: self._rows, : count - start] for name, x in step.columns.items()}
        for name, x in before.items():
            columns[name] = torch.cat([x, columns[name]], dim=1)
        return columns

    def end(self, ended: Tensor) -> None:
        """End the rows in which `ended` [n] is True."""
        self.alive.logical_and_(~ended)

    def select(self, index: Tensor) -> None:
        """Make the rows `index` the new batch, in a smaller bucket where there is one."""
        columns = self._step.mask.shape[-1]
        step = self._steps.bucket(self._pattern, len(index), columns, self._step.uniforms)
        step = step or self._step
        step.move(self._step, index)
        self._step = step
        self._rows = len(index)


def _rounded(rows: int) -> int:
    """Return the rows of a bucket: a power of two up to 32, and then a multiple of 32."""
    if rows <= 32:
        return 1 << (rows - 1).bit_length()
    return -(-rows // 32) * 32


@cache
def _pool() -> Any:
    """Return the memory that the graphs of this process share, as never two of them run at once."""
    return torch.cuda.graph_pool_handle()


def _captured(compute: Callable[[], None]) -> Callable[[], None]:
    """Capture a computation as a CUDA graph, and return what replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in the first calls
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        compute()
    return graph.replay  # type: ignore[no-any-return]
