"""Projects the score of every token on random directions, so that no gradient needs to be stored.

A score `s_t = grad log pi(a_t | prefix)` has as many entries as the model has weights. Its products with K
random sign vectors z, the probes, preserve lengths and angles in expectation: `E[(z.g)(z.h)] = g.h` (Johnson
and Lindenstrauss 1984; with random signs, Achlioptas 2003). A forward-mode derivative along z gives `z.s_t`
for every row and every token at once, so K derivatives serve all estimators.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenrl.core.statistics import generator_of
from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.rollout import Rollout, to_host
from tokenrl.language.rollout.scoring import UNCHANGED, USUAL, Regime, score


class Projections(NamedTuple):
    """Derivatives along each probe, divided by sqrt(K), so that dot products estimate those of gradients.

    They are 0 outside the mask.
    """

    logprobs: Tensor  # [N, T, K]
    entropy: Tensor | None  # [N, T, K]


def joined(parts: Sequence[Projections]) -> Projections:
    """Join the projections of several rollouts, on the CPU."""
    logprobs = torch.cat([part.logprobs.cpu() for part in parts])
    entropies = [part.entropy.cpu() for part in parts if part.entropy is not None]
    return Projections(logprobs, torch.cat(entropies) if entropies else None)


def chosen_parameters(policy: Policy, layers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the trainable parameters by name, restricted to those in which the gradient is measured.

    Args:
        policy: The policy whose model is used.
        layers: Parts of names, such as `layers.0.` or `lm_head`; `last` stands for the last block and all
            parameters after the blocks. Empty for all parameters.

    Raises:
        Refused: When a part is in no name.
    """
    named = {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}
    if not layers:
        return named
    chosen: dict[str, Tensor] = {}
    for part in layers:
        names = _last(list(named)) if part == "last" else [name for name in named if part in name]
        if not names:
            raise Refused(
                f"No trainable parameter of {policy.source!r} has {part!r} in its name. Give part of one, such as of "
                f"{', '.join(list(named)[:4])}, or 'last'."
            )
        chosen.update({name: named[name] for name in names})
    return chosen


def _last(names: Sequence[str]) -> list[str]:
    """Return the names in the last numbered block and after it; a tied head comes before the blocks."""
    matches = [re.search(r"\.(\d+)\.", name) for name in names]
    blocks = [-1 if match is None else int(match[1]) for match in matches]
    first = blocks.index(max(blocks))
    after = zip(names[first:], blocks[first:], strict=True)
    return [name for name, block in after if block in (max(blocks), -1)]


AT_ONCE = 8
"""Probes per pass of the model."""


def probes(
    parameters: Mapping[str, Tensor], count: int, *, seed: int, chunk: int = AT_ONCE
) -> Iterator[dict[str, Tensor]]:
    """Yield `count` probes of random signs, in chunks: a dict of signs [c, *shape] with c at most `chunk`.

    Probe k depends on the seed and k only, not on the chunk.
    """
    for start in range(0, count, chunk):
        # not kept here: it is large
        yield _drawn(parameters, range(start, min(start + chunk, count)), seed)


def _drawn(parameters: Mapping[str, Tensor], numbers: range, seed: int) -> dict[str, Tensor]:
    drawn = {name: p.new_empty(len(numbers), *p.shape) for name, p in parameters.items()}
    for row, k in enumerate(numbers):
        generator = generator_of(seed, "probe", k)
        for p in drawn.values():
            bits = torch.randint(0, 2, p.shape[1:], generator=generator, dtype=torch.int8)
            p[row] = 2 * bits - 1
    return drawn


def project(
    policy: Policy,
    rollout: Rollout,
    parameters: Mapping[str, Tensor],
    *,
    count: int,
    seed: int,
    max_length: int,
    distribution: Distribution = UNCHANGED,
    entropy: bool = False,
    regime: Regime = USUAL,
    after: Callable[[], None] = lambda: None,
) -> Projections:
    """Project the score of every token of a rollout on `count` probes.

    It costs about `2 count` forward passes of the rollout, and memory for eight at a time. Attention is
    computed by its plain formula, because the fused kernels have no forward-mode derivative.

    Args:
        policy: The policy that is differentiated.
        rollout: Rows to score; equal completions of a prompt are computed once.
        parameters: The parameters from `chosen_parameters`; all others are held fixed.
        count: Number of probes, K.
        seed: Seed of the probes.
        max_length: T of the result, at least that of the rollout.
        distribution: Distribution of tokens that was sampled from.
        entropy: Whether to project the derivatives of the entropies too.
        regime: How the policy is scored; its logits are never computed in chunks here.
        after: Called after each pass of eight probes.

    Returns:
        The projections on the CPU, in the precision of the model.
    """
    parameters = dict(parameters)
    index, row_of = _distinct(rollout)
    whole = Regime(regime.share_prompt)
    distinct = rollout.take(index)

    def scores(changed: dict[str, Tensor]) -> tuple[Tensor, ...]:
        model = _Changed(policy.model, changed)
        scored = score(model, distinct, whole, distribution=distribution, entropy=entropy)
        return (scored.logprobs,) if scored.entropy is None else (scored.logprobs, scored.entropy)

    def slopes(direction: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return torch.func.jvp(scores, (parameters,), (direction,))[1]  # type: ignore[no-any-return]

    tangents: list[tuple[Tensor, ...]] = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for directions in probes(parameters, count, seed=seed):
            # vmap batches only the tangents, so the model itself is computed once for all of them.
            tangents.append(torch.vmap(slopes)(directions))  # [c, n, t] each
            del directions  # else they are still there while the next ones are drawn
            after()
    out = []
    for column in zip(*tangents, strict=True):
        (derivatives,) = to_host([torch.cat(column)])
        whole = derivatives.permute(1, 2, 0)[row_of] / count**0.5  # [N, t, K]
        out.append(torch.nn.functional.pad(whole, (0, 0, 0, max_length - whole.shape[1])))
    return Projections(out[0], out[1] if entropy else None)


class _Changed(nn.Module):
    """A model whose forward pass takes other values of some of its parameters."""

    def __init__(self, model: nn.Module, changed: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.changed = changed

    def forward(self, *args: Any, **options: Any) -> Any:
        return torch.func.functional_call(self.model, self.changed, args, options)


def _distinct(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return a row of each distinct (prompt, completion), and the number of its pair for each row."""
    ids = rollout.completion_ids.masked_fill(~rollout.mask, -1)
    table = torch.cat([rollout.prompt_index[:, None], ids], dim=1)
    unique, row_of = torch.unique(table, dim=0, return_inverse=True)
    rows = torch.arange(len(row_of), device=row_of.device)
    return rows.new_zeros(len(unique)).scatter(0, row_of, rows), row_of
