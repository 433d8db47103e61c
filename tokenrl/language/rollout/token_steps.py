"""Memory that keeps its address, so that a GPU can replay a token-step as one CUDA graph.

Launched one by one, the operations of a token-step (some hundred) take a GPU longer to be started than to be
computed. In memory that keeps its address the whole is started at once.
Memory comes in sizes (buckets): a batch takes the smallest that holds it, and a smaller one when rows have ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tokenrl.language.rollout.batch import Batch

LEAST_COLUMNS = 64
LIMIT = 4 * 2**30
"""Bytes that all buckets may take. A batch that alone needs more is sampled without them."""


class TokenSteps:
    """The buckets of a run, which are made when they are first needed."""

    def __init__(self, limit: int = LIMIT) -> None:
        """Begin without buckets; they may take `limit` bytes, and are dropped where another needs their room."""
        self._limit = limit
        self._buckets: dict[Any, Batch] = {}

    def __len__(self) -> int:
        """Return the number of buckets."""
        return len(self._buckets)

    def take(self, batch: Batch, index: Tensor, tokens: int) -> Batch | None:
        """Return the rows `index` of a batch in the smallest bucket that holds them.

        Args:
            batch: the batch.
            index: numbers of its rows.
            tokens: the most tokens of a prompt and its completion.

        Returns:
            The bucket; None if it needs too much memory, or the cache of the batch does not keep all tokens.
        """
        columns = LEAST_COLUMNS
        while columns < tokens:
            columns *= 2
        rows = _rounded(len(index))
        sampling = replace(
            batch.sampling, max_completion_length=1, num_generations=1, seed=0, step=0
        )
        # A graph reads the weights where they were when it was captured.
        model = batch.policy.model
        weights = chain(model.parameters(), model.buffers())
        addresses = tuple(x.data_ptr() for x in weights)
        is_greedy = batch.uniforms is None
        key = rows, columns, sampling, is_greedy, batch.policy.eos_ids, model, addresses
        if key not in self._buckets:
            if batch.cache.recurrent or not batch.cache.keeps(columns):
                return None
            bucket = batch.fixed(rows, columns)
            if bucket.nbytes > self._limit:
                return None
            if bucket.nbytes + sum(x.nbytes for x in self._buckets.values()) > self._limit:
                self._buckets.clear()
            if bucket.token.is_cuda:
                bucket.graph = _captured(bucket.compute)
            self._buckets[key] = bucket
        bucket = self._buckets[key]
        bucket.take(batch, index)
        return bucket


def _rounded(rows: int) -> int:
    """Return the rows of a bucket: a power of two up to 32, and then a multiple of 32."""
    if rows <= 32:
        return 1 << (rows - 1).bit_length()
    return -(-rows // 32) * 32


@cache
def _pool() -> Any:
    """Return the memory that the graphs of this process share, as never two of them run at once."""
    return torch.cuda.graph_pool_handle()


def _captured(compute: Callable[[], None]) -> Any:
    """Capture a computation as a CUDA graph, and return it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in the first calls
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        compute()
    return graph
