"""Checks what an engine returns: its columns against their declaration, its numbers against the trainer's.

An engine may compute in another precision or sample from weights that are an update old, so its numbers need
not equal the trainer's. What is refused here is further away than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.core.rows import completion_mask
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.agreement import Trial, WrongRollout
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.forward import shape_of
from tokenrl.language.rollout.rollout import COLUMNS, Rollout, pad_left, to_device, zeroed
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Scores, Scoring, score_in_parts
from tokenrl.settings import shown

COMPARED = 32
"""Completions of an engine that the trainer scores for a check alone, at most."""
ROUNDING = 0.05
"""Largest difference, in nats per token, between the log-probabilities of the trainer and of an engine that
agrees with it, in float32."""
COARSE = 0.3
"""The same of such an engine in half precision."""
FARTHEST = 1.0
"""The same of another engine, while both have the weights of the start. Rounded weights and another temperature
stay below it, and a warning tells of them (`sampling-differs`)."""
FARTHEST_TOKEN, SHORT = 5.0, 8
"""Largest difference in nats that counts for a token of a row, and the largest by which a greedy token may be less
probable; and the least number of tokens by which the sum of a row is divided."""
ELSEWHERE = 0.2
"""The largest share of probability, averaged over tokens, that an engine's distribution may have on other tokens."""
LESS_PROBABLE = 0.25
"""Nats by which a greedy token may be less probable than the most probable one, as an engine rounds in its own way;
and the share of the tokens that may be even less probable."""


def checked(
    answer: object, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, policy: Policy
) -> Rollout:
    """Return the rollout that an engine returned as training reads it: copied, on the CPU, 0 off the mask.

    The columns that the trainer computes itself are left out, whatever an engine says of them.

    Args:
        answer: what the engine returned.
        prompt_ids: ids of the B prompts that it was given.
        sampling: how it was to sample.
        policy: the policy that was to be sampled.

    Raises:
        WrongRollout: it is not what was asked for.
    """
    if not isinstance(answer, Rollout):
        raise WrongRollout(f"it is {shown(answer)}, not a Rollout")
    ids, present = pad_left(prompt_ids, policy.pad_id)
    index = torch.arange(len(ids)).repeat_interleave(sampling.group_size)
    vocabulary: int = shape_of(policy).vocab_size
    listed = vocabulary if answer.top_ids is None else sampling.keep_top or vocabulary
    sizes = {"N": len(index), "P": ids.shape[1], "K": min(listed, vocabulary)}
    columns = dict[str, Any]()
    for name, x in answer.on_host().columns().items():
        if name not in Scores._fields:
            columns[name] = _declared(name, x, sizes)
    for name, x in columns.items():
        if "T" in COLUMNS[name].axes:
            columns[name] = zeroed(x, columns["mask"])
    table = Rollout(**columns)
    asked = replace(table, prompt_index=index, prompt_ids=ids[index], prompt_mask=present[index])
    for name, allowed, reason in _allowed(table, asked, sampling, policy):
        x = columns[name]
        # Equal numbers may be infinite, and a comparison with NaN is False.
        wrong = ~((x == allowed) | ((x.float() - allowed.float()).abs() <= ROUNDING))
        rows = wrong.reshape(len(index), -1).any(dim=1)
        if rows.any():
            row = int(rows.int().argmax())
            values = " instead of ".join(shown(numbers[row].tolist()) for numbers in (x, allowed))
            raise WrongRollout(
                f"{name} must be {reason}; in row {row} of {len(rows)} it is {values}"
            )
    return asked.take(torch.arange(len(index)))


def _declared(name: str, x: object, sizes: dict[str, int]) -> Tensor:
    """Return a column that an engine returned in its declared type; refuse another shape or kind of numbers.

    Args:
        name: the name of the column.
        x: the column.
        sizes: lengths of axes by their letters; those that are not known yet are added.
    """
    column = COLUMNS.get(name)
    if column is None or not isinstance(x, Tensor):
        raise WrongRollout(f"{name} is {shown(x)}; an engine fills tensors of {', '.join(COLUMNS)}")
    shape = [sizes.setdefault(axis, n) for axis, n in zip(column.axes, x.shape, strict=False)]
    kinds = {(dtype.is_floating_point, dtype == torch.bool) for dtype in (x.dtype, column.dtype)}
    if list(x.shape) != shape or x.ndim != len(column.axes) or len(kinds) > 1:
        given = f"{name} has the shape {list(x.shape)} and numbers of type {x.dtype}"
        raise WrongRollout(f"{given}, not those of {column} with {sizes}")
    return x.detach().to(torch.promote_types(x.dtype, column.dtype))


def _allowed(
    table: Rollout, asked: Rollout, sampling: Sampling, policy: Policy
) -> Iterator[tuple[str, Tensor, str]]:
    """Yield columns by name, with what their numbers have to be, given the others, and with the rule.

    What comes later reads what was right before.

    Args:
        table: what the engine returned, 0 off the mask.
        asked: the same with the prompts that the engine was given.
        sampling: how the engine was to sample.
        policy: the policy that was to be sampled.
    """
    for name, x in table.columns().items():
        low, high = COLUMNS[name][2:]
        if low is not None:
            if x.dtype == torch.int64:
                high = shape_of(policy).vocab_size - 1
            yield name, x.where(x >= low, low).clamp(max=high), f"from {low:g} to {high:g}"
    yield "prompt_index", asked.prompt_index, "the prompts in order"
    yield "prompt_mask", asked.prompt_mask, "True on the prompt, padded on the left"
    prompts = asked.prompt_ids.where(asked.prompt_mask, table.prompt_ids)
    yield "prompt_ids", prompts, "those of the prompt"

    limit = sampling.max_completion_length
    ids = table.completion_ids
    counts = table.mask.sum(dim=1).clamp(1, limit)
    ends = torch.tensor(policy.eos_ids, dtype=torch.int64)
    ended = torch.isin(ids.gather(1, counts[:, None] - 1)[:, 0], ends)
    truncated = ~ended
    if policy.stops is not None:  # an engine may read the text of a stop string in another way
        policy.stops.end(ids, counts, ended)
        truncated = ~ended & table.truncated
    actions = completion_mask(ids, policy.eos_ids, counts)
    yield "mask", actions, f"True on 1 to {limit} tokens, up to the first end"
    # Where a completion ends before the limit without an end, either value is wrong.
    truncated = truncated & ~(table.truncated & (counts < limit))
    yield "truncated", truncated, f"True where {limit} tokens have no end, and False elsewhere"
    if table.sampling_distribution is not None:
        yield from _allowed_distributions(table)


def _allowed_distributions(table: Rollout) -> Iterator[tuple[str, Tensor, str]]:
    """Yield the same of the distributions of tokens, without an order of the tokens that are listed."""
    logp = table.sampling_distribution  # [N, T, K]
    ids, sampled = (
        to_device(x[..., None], logp.device)
        for x in (table.completion_ids, table.sampling_logprobs)
    )
    listed = torch.arange(logp.shape[2], device=logp.device)
    if table.top_ids is not None:
        listed = table.top_ids
        ordered, order = listed.sort(dim=2, stable=True)
        repeated = pad((ordered.diff(dim=2) == 0).long(), (1, 0))
        repeated = torch.zeros_like(listed).scatter(2, order, repeated)
        yield "top_ids", listed + zeroed(repeated, table.mask), "different tokens"
    logp = logp.where(listed != ids, sampled.to(logp.dtype))
    excess = logp.logsumexp(dim=2, keepdim=True)
    if table.top_ids is not None:  # the tokens that are not listed have the rest
        excess = excess.clamp(min=0)
    rule = "log-probabilities that add up to 1 and agree with sampling_logprobs"
    yield "sampling_distribution", zeroed(logp - excess, table.mask), rule


def check_samples(
    rows: Rollout, sampling: Sampling, policy: Policy, scoring: Scoring, limit: float
) -> None:
    """Compare sampled completions with the trainer.

    Args:
        rows: N completions with the trainer's `logprobs`.
        sampling: how they were sampled.
        policy: the policy that was to be sampled.
        scoring: how it is scored.
        limit: nats per token by which a row, or all rows together, may differ at temperature 1.

    Raises:
        WrongRollout: log-probabilities of the sampled tokens differ by more, or distributions of all tokens have
            more than the share `ELSEWHERE` of the probability on other tokens.
    """

    def total_variation(logp: Tensor, of_sampler: Tensor) -> Tensor:
        return (logp.exp() - of_sampler.exp()).abs().sum(dim=-1) / 2

    limit /= min(1.0, sampling.temperature)  # the temperature divides what rounding changes
    gaps = (rows.sampling_logprobs - rows.logprobs).abs().double() * rows.mask  # [N, T]
    counts = rows.mask.sum(dim=1)
    # A token at the edge of what top-p keeps may be off by much, and a short row has few others.
    of_row = gaps.clamp(max=FARTHEST_TOKEN).sum(dim=1) / counts.clamp(min=SHORT)  # [N]
    row = int(of_row.argmax())
    gap = float(gaps.sum() / counts.sum().clamp(min=1))
    if max(gap, float(of_row[row])) > limit:
        raise WrongRollout(
            f"sampling_logprobs differ from the trainer's by {gap:.2g} nats per token, and by {of_row[row]:.2g} in "
            f"row {row} of {len(rows)}, so these tokens are of other weights, another distribution or another prompt"
        )
    if rows.sampling_distribution is None:
        return
    few = rows.take(torch.arange(min(COMPARED, len(rows))))
    options: dict[str, Any] = {"distribution": sampling, "centres": total_variation}
    shares: Any = score_in_parts(policy.model, few, scoring, rows_at_once=None, **options).centres
    share = float(shares.cpu()[few.mask].double().mean())
    if share > ELSEWHERE:
        raise WrongRollout(
            f"sampling_distribution has {share:.0%} of the probability on other tokens than the trainer's, so it is "
            "of other weights, or not that of this sampler"
        )


def check_trial(rows: Rollout, sampling: Sampling, policy: Policy) -> None:
    """Compare the first sampled completions of an engine that agrees with those of each row alone.

    Raises:
        WrongRollout: the log-probabilities differ by more than rounding.
    """
    if sampling.is_whole:
        few = rows.take(torch.arange(4) * min(COMPARED, len(rows)) // 4)
        few = few.cut(few.prompt_ids.shape[1], min(4, few.mask.shape[1]))
        trial = Trial.of(policy, few, sampling)
        trial.compare("the engine, against the trainer's model,", few.sampling_logprobs)


def check_greedy(rows: Rollout, policy: Policy, scoring: Scoring) -> None:
    """Compare greedy completions of an engine with the trainer, which has the same weights then.

    Raises:
        WrongRollout: many of their tokens are not the most probable ones.
    """
    rows = rows.take(torch.arange(min(COMPARED, len(rows))))
    options: dict[str, Any] = {"rows_at_once": None, "distribution": Distribution(top_k=1)}
    scores = score_in_parts(policy.model, rows, scoring, **options)
    # Of the most probable token and the chosen one, the latter has log-probability -log(1 + exp(gap)).
    gaps = torch.expm1(-scores.logprobs[rows.mask]).log()
    share = float((gaps > LESS_PROBABLE).double().mean())
    if share > LESS_PROBABLE or bool((gaps > FARTHEST_TOKEN).any()):
        raise WrongRollout(f"{share:.0%} of its greedy tokens are not the most probable ones")
