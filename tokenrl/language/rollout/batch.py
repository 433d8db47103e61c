"""Samples the rows of a batch token by token, in memory that grows or in memory that keeps its address.

A token-step feeds each row its last token and draws the next one. It reads and writes buffers only, and the
device counts positions, so that the host is asked for nothing. Launched one by one, its operations (some hundred)
take a GPU longer to be started than to be computed. In memory that keeps its address it is one CUDA graph, and the
whole is started at once.

This memory comes in sizes (buckets): a batch takes the smallest that holds it, and a smaller one when rows have
ended.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.reading import Last, forward
from tokenrl.language.rollout.rollout import listed
from tokenrl.language.rollout.sampling import Sampling, draw

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy

WINDOW = 8
"""The most tokens that are sampled before the host looks at them."""
LEAST_COLUMNS = 64
OF_ROWS = ("position", "alive", "token")
"""What a batch holds of each row beside its cache and its mask."""
LIMIT = 4 * 2**30
"""Bytes that all buckets may take. A batch that alone needs more is sampled without them."""


@dataclass
class Batch:
    """R rows of which a token was drawn, and the token-step that works on them.

    Memory that grows has as many rows as the batch. Memory that keeps its size may have more, which no
    completion uses; their positions begin at 0.

    Attributes:
        policy: the policy.
        sampling: how the rows are sampled.
        cache: the cache of the tokens that were fed to the model: all but the last one that was drawn.
        mask: True on these, and False on padding on their left [R, columns]; None without padding, and where the
            model takes none. In memory that keeps its size, True on the columns that are read [R, 1, 1, L].
        position: how many tokens of each row were fed [R].
        alive: True for the rows that have not ended [R].
        token: the last token that was drawn [R].
        eos: the ids that end a row.
        uniforms: random numbers of the tokens of a window [R, WINDOW]; None to take the most probable tokens.
        slot: the next token in the window [1].
        columns: what was drawn in the window: `ids`, `mask` with True on tokens up to the end of their row, and
            columns of a `Rollout`, each [R, WINDOW, ...]. Where rows have left, these and the uniforms have more.
        column: where the next token is written in memory that keeps its size [1]; None in memory that grows.
        graph: the token-step as a CUDA graph; None to compute it.
    """

    policy: Policy
    sampling: Sampling
    cache: Cache
    mask: Tensor | None
    position: Tensor
    alive: Tensor
    token: Tensor
    eos: Tensor
    uniforms: Tensor | None
    slot: Tensor
    columns: dict[str, Tensor]
    column: Tensor | None = None
    graph: Any = None

    @classmethod
    def of(
        cls,
        policy: Policy,
        sampling: Sampling,
        cache: Cache,
        mask: Tensor | None,
        position: Tensor,
        first: dict[str, Tensor],
        draws: Tensor | None,
    ) -> Batch:
        """Return the batch of the prompts that were read, which `take` or `select` makes the rows of its groups.

        Args:
            policy: the policy.
            sampling: how the rows are sampled.
            cache: the cache of the B prompts.
            mask: True on their tokens, and False on the padding on their left [B, P]; None without padding.
            position: how many tokens each has [B].
            first: what was drawn after the prompts of n rows, see `drawn`.
            draws: random numbers [n, T], of which only the type counts; None for greedy completions.
        """
        alive = torch.ones_like(position, dtype=torch.bool)
        like = {**first, "mask": first["ids"].bool()}
        return cls(
            policy=policy,
            sampling=sampling,
            cache=cache,
            mask=mask if cache.takes_positions else None,
            position=position,
            alive=alive,
            token=torch.zeros_like(position),
            eos=torch.tensor(policy.eos_ids, device=position.device),
            uniforms=None if draws is None else draws.new_zeros(len(draws), WINDOW),
            slot=position.new_zeros(1),
            columns={n: x.new_zeros(len(x), WINDOW, *x.shape[1:]) for n, x in like.items()},
        )

    def fixed(self, rows: int, columns: int) -> Batch:
        """Return memory that keeps its size, for batches like this one.

        Args:
            rows: R.
            columns: L, the most tokens of a prompt and its completion.
        """
        column = self.slot.new_zeros(1)
        of_rows: dict[str, Any] = {name: _zeros(getattr(self, name), rows) for name in OF_ROWS}
        return replace(
            self,
            cache=self.cache.zeros(rows, columns, column=column),
            mask=self.alive.new_zeros(rows, 1, 1, columns),
            uniforms=None if self.uniforms is None else _zeros(self.uniforms, rows),
            slot=self.slot.new_zeros(1),
            columns={name: _zeros(x, rows) for name, x in self.columns.items()},
            column=column,
            graph=None,
            **of_rows,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory that keeps its size."""
        assert self.mask is not None
        return self.cache.nbytes + self.mask.nbytes + sum(x.nbytes for x in self.columns.values())

    def select(self, index: Tensor) -> None:
        """Make the rows `index` the batch, in memory that grows."""
        self.cache.select(index)
        for name in OF_ROWS:
            setattr(self, name, getattr(self, name)[index])
        if self.mask is not None:
            self.mask = self.mask[index]

    def take(self, source: Batch, index: Tensor) -> None:
        """Make the rows `index` of a batch this one, in memory that keeps its size.

        Args:
            source: a batch in any memory, also in this one.
            index: numbers of n of its rows.
        """
        assert self.mask is not None and self.column is not None
        n = len(index)
        width = source.cache.columns
        numbers = torch.arange(n, device=index.device)
        columns = torch.arange(width, device=index.device)
        self.cache.put(numbers, source.cache, index, columns)
        visible: Tensor | bool = True
        if source.mask is not None:
            visible = source.mask.view(-1, width)[index]
        self.mask.fill_(False)
        self.mask[:n, 0, 0, :width] = visible
        self.column[:] = width if source.column is None else source.column
        for name in OF_ROWS:
            getattr(self, name)[:n] = getattr(source, name)[index]
        self.position[n:] = 0

    def begin(self, uniforms: Tensor | None) -> None:
        """Begin a window of t tokens of n rows, with uniforms [n, t] or greedily without them."""
        self.slot.zero_()
        if self.uniforms is not None and uniforms is not None:
            n, t = uniforms.shape
            self.uniforms[:n, :t] = uniforms

    def step(self) -> None:
        """Feed each row its last token, and draw the next one; the host is not asked for anything."""
        if self.graph is not None:
            self.graph.replay()
            return
        positions = {}
        if self.mask is not None:
            if self.column is None:
                self.mask = pad(self.mask, (0, 1), value=True)
            else:
                self.mask.index_fill_(3, self.column, True)
            positions = {"attention_mask": self.mask, "position_ids": self.position[:, None]}
        options = {self.cache.name: self.cache.held, **positions}
        tokens = self.token[:, None]
        self.cache, last = forward(self.policy.model, self.sampling, tokens, **options)
        uniforms = None
        if self.uniforms is not None:
            uniforms = self.uniforms[: len(self.token)].index_select(1, self.slot).squeeze(1)
        self.write(drawn(self.sampling, last, uniforms))
        self.position.add_(1)
        if self.column is not None:
            self.column.add_(1)

    def write(self, numbers: dict[str, Tensor]) -> None:
        """Write down the tokens that were drawn for n rows, with their numbers, as `drawn` returns them."""
        n = len(numbers["ids"])
        for name, x in {**numbers, "mask": self.alive[:n]}.items():
            self.columns[name][:n].index_copy_(1, self.slot, x[:, None])
        self.token[:n] = numbers["ids"]
        self.alive.logical_and_(~torch.isin(self.token, self.eos))
        self.slot.add_(1)


def drawn(sampling: Sampling, last: Last, uniforms: Tensor | None) -> dict[str, Tensor]:
    """Draw one token per row, and compute its columns of a `Rollout`; the host is not asked for anything.

    Args:
        sampling: the distribution, and which columns are kept.
        last: what follows the last token of n rows.
        uniforms: random numbers [n]; None to take the most probable token.

    Returns:
        The tokens, `ids` [n], and the columns [n, ...].
    """
    logp = sampling.log_probabilities(last.logits)
    p = logp.exp()
    token = logp.argmax(dim=-1) if uniforms is None else draw(p, uniforms)
    logprobs = logp.gather(1, token[:, None]).squeeze(1)
    numbers = {"ids": token, "logprobs": logprobs, "entropy": entropy_of(logp, p)}
    if sampling.keep_score_norms:
        numbers["score_norms"] = score_norm_of(logprobs, p)
    if sampling.keep_hidden:
        numbers["hidden"] = last.hidden
    if sampling.keep_tokens:
        most = logp.topk(min(sampling.keep_tokens, logp.shape[1])).indices
        ids = most.sort(dim=1).values  # in the order of the vocabulary
        numbers["sampling_distribution"] = listed(ids, logp.gather(1, ids))
    return numbers


def _zeros(x: Tensor, rows: int) -> Tensor:
    """Return zeros like the rows of a tensor, but so many."""
    return x.new_zeros(rows, *x.shape[1:])


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
                bucket.graph = _captured(bucket.step)
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
