"""Projects the score of every token on random directions, so that no gradient needs to be stored.

A score `s_t = grad log pi(a_t | prefix)` has as many entries as the model has weights. Its products with K
random sign vectors z, the probes, preserve lengths and angles in expectation: `E[(z.g)(z.h)] = g.h` (Johnson
and Lindenstrauss 1984; with random signs, Achlioptas 2003). A forward-mode derivative along z gives `z.s_t`
for every row and every token at once, so K derivatives serve all estimators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokenrl.core.statistics import generator_of
from tokenrl.errors import Refused
from tokenrl.language import Distribution, Policy, Regime, Rollout, score


def chosen_parameters(policy: Policy, layers: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the trainable parameters by name, restricted to those in which the gradient is measured.

    Args:
        policy: The policy whose model is used.
        layers: Parts of names, such as `layers.0.` or `lm_head`; empty for all parameters.

    Raises:
        Refused: When a part is in no name.
    """
    named = {name: p.detach() for name, p in policy.model.named_parameters() if p.requires_grad}
    if not layers:
        return named
    chosen: dict[str, Tensor] = {}
    for part in layers:
        names = [name for name in named if part in name]
        if not names:
            raise Refused(
                f"No trainable parameter of {policy.source!r} has {part!r} in its name. Give part of one, such as of "
                f"{', '.join(list(named)[:4])}."
            )
        chosen.update({name: named[name] for name in names})
    return chosen


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
    distribution: Distribution,
    regime: Regime,
    after: Callable[[], None] = lambda: None,
) -> Tensor:
    """Project the score of every token of a rollout on `count` probes, divided by sqrt(K).

    So dot products of the results estimate those of gradients.

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
        regime: How the policy is scored; its logits are never computed in chunks here.
        after: Called after each pass of eight probes.

    Returns:
        The projections [N, T, K] on the CPU, in the precision of the model; 0 outside the mask.
    """
    parameters = dict(parameters)
    index, row_of = _distinct(rollout)
    whole = Regime(regime.share_prompt)
    distinct = rollout.take(index)

    def logprobs(changed: dict[str, Tensor]) -> Tensor:
        model = _Changed(policy.model, changed)
        return score(model, distinct, whole, distribution=distribution).logprobs

    def slopes(direction: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(logprobs, (parameters,), (direction,))[1]  # type: ignore[no-any-return]

    tangents: list[Tensor] = []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for directions in probes(parameters, count, seed=seed):
            # vmap batches only the tangents, so the model itself is computed once for all of them.
            tangents.append(torch.vmap(slopes)(directions))  # [c, n, t]
            del directions  # else they are still there while the next ones are drawn
            after()
    derivatives = torch.cat(tangents).cpu()
    projections = derivatives.permute(1, 2, 0)[row_of] / count**0.5  # [N, t, K]
    return torch.nn.functional.pad(projections, (0, 0, 0, max_length - projections.shape[1])).cpu()


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
