"""Samples completions of some prompts token by token, from their first tokens on until all rows have ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.errors import Stopped
from tokenrl.language.rollout.batch import Batch, drawn
from tokenrl.language.rollout.reading import Histories, Prefix, padding, read
from tokenrl.language.rollout.rollout import Rollout, pad_left, to_device, to_host, zeroed
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Regime

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.policy.stops import StopStrings

WINDOW = 8
"""Tokens of a completion that a device samples between two looks at which rows are left. A look waits until the device
has computed all that it was given; rows that end before it are sampled on, and cut."""
LOOK_EVERY = {"cpu": 1}
"""The same of kinds of devices for which it is not `WINDOW`."""

NOT_FINITE = (
    "The model's logits are not finite while sampling: its weights have probably diverged. Lower the "
    "learning rate, or go back to an earlier checkpoint; with float16 try bfloat16."
)


def decode(
    policy: Policy,
    regime: Regime,
    histories: Histories | None,
    numbers: Sequence[int],
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    draws: Tensor | None,
) -> Rollout:
    """Sample completions; the batch holds only unfinished rows and, for a while, a few finished ones.

    Args:
        policy: the policy.
        regime: how its model is sampled.
        histories: what the rows of a batch of episodes have read, to which these rows add; None to keep nothing.
        numbers: with `histories`, the number of each row in that batch. A prompt has one row then.
        prompts: ids of B prompts.
        sampling: how they are sampled.
        draws: uniforms [B * G, T] on the device of the policy; None for greedy completions.
    """
    length = sampling.max_completion_length
    device = policy.device
    prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id)
    width = prompt_ids.shape[1]
    prompt_index = torch.arange(len(prompts)).repeat_interleave(sampling.group_size)
    prefixes = None if histories is None else histories.take(numbers, prompts)
    batch, first = _begun(policy, regime, prefixes, prompts, prompt_index, sampling, draws)
    window = [batch.add(first)]
    shape = len(prompt_index), length
    table = {name: x.new_zeros(*shape, *x.shape[1:]) for name, x in window[0].items()}
    rows = to_device(torch.arange(len(prompt_index)), device)  # that are still in the batch
    look_every = LOOK_EVERY.get(device.type, WINDOW)
    for start in range(0, length, look_every):
        end = min(start + look_every, length)
        for t in range(start + len(window), end):
            window.append(batch.step(None if draws is None else draws[rows, t]))
        for name, column in table.items():
            column[rows, start:end] = torch.stack([numbers[name] for numbers in window], dim=1)
        window = []
        alive = batch.alive
        if policy.stops is not None:
            at_stops = _end_at_stops(policy.stops, table["ids"], table["mask"], start, end - 1)
            alive.logical_and_(~at_stops[rows])
        if end == length and histories is None:
            break
        looked = to_host([alive, rows, table["mask"].sum(dim=1)[rows]])
        if histories is not None:
            of_rows = zip(*map(Tensor.tolist, looked), strict=True)
            ended = [
                (row, numbers[place], len(prompts[place]), count - 1)
                for row, (is_alive, place, count) in enumerate(of_rows)
                if not is_alive and count > start
            ]
            histories.add(batch.cache, width, end - 1, ended)
        unfinished = looked[0].nonzero().squeeze(1)
        if end == length or not len(unfinished):
            break
        # Copying the cache costs as much as keeping a few finished rows.
        if len(unfinished) <= 0.75 * len(rows) and not regime.plain_cache:
            index = to_device(unfinished, device)
            batch.select(index)
            rows = rows[index]
    rollout = _rollout(
        table,
        policy.pad_id,
        prompt_ids=prompt_ids[prompt_index],
        prompt_mask=prompt_mask[prompt_index],
        prompt_index=prompt_index,
        truncated=alive.new_zeros(len(prompt_index)).index_put((rows,), alive),
    )
    return rollout.cut(width, int(rollout.mask.any(dim=0).sum()))


def _begun(
    policy: Policy,
    regime: Regime,
    prefixes: Mapping[tuple[int, ...], Prefix | None] | None,
    prompts: Sequence[Sequence[int]],
    index: Tensor,
    sampling: Sampling,
    draws: Tensor | None,
) -> tuple[Batch, dict[str, Tensor]]:
    """Read prompts, and draw the first token of each row.

    Args:
        policy: the policy.
        regime: how its model is sampled.
        prefixes: the distinct prompts, and what was read of each before; None for nothing of any.
        prompts: ids of B prompts.
        index: the prompt of each row [N].
        sampling: how they are sampled.
        draws: uniforms [N, T]; None for greedy completions.

    Returns:
        The batch, and what was drawn, which is not added to it yet.
    """
    of_prompts = index
    if prefixes is not None:
        places = {ids: place for place, ids in enumerate(prefixes)}
        index = torch.tensor([places[tuple(prompts[i])] for i in index.tolist()])
        prompts = list(prefixes)
    elif regime.plain_cache:
        prompts = [prompts[i] for i in index.tolist()]
        index = torch.arange(len(prompts))
    before = [None] * len(prompts) if prefixes is None else list(prefixes.values())
    cache, last = read(policy, sampling, prompts, before)
    rows = to_device(index, policy.device)
    uniforms = None if draws is None else draws[:, 0]
    keys = None
    if sampling.allowed:
        rules: Any = sampling.allowed
        keys = rules.begins[of_prompts]
    first = drawn(sampling, last.of(rows), uniforms, keys)
    mask, position = padding(policy, prompts)
    batch = Batch(
        policy=policy,
        sampling=sampling,
        cache=cache,
        mask=mask if cache.takes_positions else None,
        position=position,
        eos=torch.tensor(policy.eos_ids, device=policy.device),
        alive=torch.ones_like(position, dtype=torch.bool),
        token=torch.zeros_like(position),
    )
    if not regime.plain_cache:
        # A cache with a row for each prompt is not copied.
        if not torch.equal(index, torch.arange(len(prompts))):
            batch.select(rows)
        batch.cache.make_room(sampling.max_completion_length)
    return batch, first


def _rollout(table: Mapping[str, Tensor], pad_id: int, **columns: Any) -> Rollout:
    """Return the rollout of N completions, on the host.

    Args:
        table: `ids`, `mask`, True on tokens up to the end of their completion, behind which rows may go on, and
            columns of a `Rollout` by name, each [N, T, ...].
        pad_id: the id behind the end of a completion.
        **columns: the columns of their prompts, and whether each has no end.

    Raises:
        Stopped: an entropy is not finite. A NaN in any logit of a row makes the entropy of the row NaN.
    """
    mask = table["mask"]
    of_tokens: dict[str, Any] = {name: zeroed(x, mask) for name, x in table.items()}
    rollout = Rollout(
        completion_ids=of_tokens.pop("ids").masked_fill(~mask, pad_id),
        sampling_logprobs=of_tokens["logprobs"],
        **of_tokens,
        **columns,
    ).on_host()
    if not rollout.entropy.isfinite().all():
        raise Stopped(NOT_FINITE)
    return rollout


def _end_at_stops(stops: StopStrings, ids: Tensor, mask: Tensor, start: int, end: int) -> Tensor:
    """Cut the mask behind stop strings that tokens from `start` to `end` complete.

    Args:
        stops: the stop strings.
        ids: ids of N completions [N, T].
        mask: True on their tokens so far, changed in place [N, T].
        start: position of the first token that was not looked at before.
        end: position of the last token.

    Returns:
        True for the rows that a stop string has ended [N].
    """
    host_ids, host_mask = to_host([ids, mask])
    lengths = host_mask.sum(dim=1)
    ended = torch.zeros(len(ids), dtype=torch.bool)
    stops.end(host_ids[:, : end + 1], lengths, ended, start)
    mask.copy_(host_mask & (torch.arange(ids.shape[1]) < lengths[:, None]))
    return to_device(ended, ids.device)
