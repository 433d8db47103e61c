"""Samples completions: the base class `Generator`, and the default, which samples from the policy's own model.

Tokens are drawn by inverting the CDF at uniform random numbers that are fixed by (stream, seed, step, prompt,
generation, position). A completion therefore depends neither on the other rows of its batch nor on the number
of processes, and two estimators can be compared on common random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokenrl.errors import Stopped
from tokenrl.language.policy.copies import copied
from tokenrl.language.rollout.decoder import Decoder
from tokenrl.language.rollout.drawing import on_device
from tokenrl.language.rollout.prefixes import GIB, EndedRows, PrefixCache
from tokenrl.language.rollout.rollout import (
    ABSENT,
    Rollout,
    cat,
    pad_left,
    to_device,
    to_host,
    zeroed,
)
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import USUAL, Way
from tokenrl.language.rollout.token_steps import WINDOW, FixedDecoder

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.policy.stops import StopStrings

LOOK_EVERY = {"cpu": 1}
"""Tokens of a completion that a device samples between two looks at which rows are left; by default `WINDOW`. A look
waits until the device has computed all that it was given; rows that end before it are sampled on, and cut."""

NOT_FINITE = (
    "The model's logits are not finite while sampling: its weights have probably diverged. Lower the "
    "learning rate, or go back to an earlier checkpoint; with float16 try bfloat16."
)


@dataclass(frozen=True)
class Abilities:
    """What an engine can do. The class of an engine, or a function that makes one, holds it as `abilities`.

    Attributes:
        exact: its completions depend on the weights and on `draws` alone, so a run repeats bit for bit.
        agrees: it computes the trainer's probabilities up to rounding; a run refuses to start if it does not.
            Other engines may differ more (see `check_samples`), and a run warns of the difference. So may an
            engine from the first call of its `announce` on, because its weights may be an update old.
        distributed: it samples in a run of several processes.
        min_p_last: with `top_p` and `min_p` it samples from the tokens that `Distribution` keeps.
        temperatures: the lowest and the highest temperature that it samples at.
    """

    exact: bool = True
    agrees: bool = False
    distributed: bool = True
    min_p_last: bool = True
    temperatures: tuple[float, float] = (0.0, math.inf)


class Generator:
    """An engine that samples completions. If it holds a copy of the weights, `sync` updates the copy.

    An engine of your own may derive from this class, whose methods but `generate` do nothing, or have such methods
    without it. What it returns is checked in each rollout, see `training.engines`. An engine that cannot do all
    that the default one can has an attribute `abilities`, see `Abilities`.

    An engine that can sample a step while the update of the step before is made has a method `announce`. With
    `sync_every` above 1 it is called before each step but the last. It gets the prompts of this process in the
    step after it, each as a number and a copy of a row of the data. It is not called where these prompts are
    unknown: in episodes, and where groups of equal rewards are resampled.

    Attributes:
        abilities: what the engine can do.
        remark: in words, how far its completions differed from the trainer's; empty if little.
    """

    abilities: ClassVar[Abilities] = Abilities()
    remark = ""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample `sampling.group_size` completions of each prompt.

        Args:
            prompt_ids: ids of B prompts, of any lengths.
            sampling: length limit, distribution of tokens, and number of completions per prompt.
            draws: uniforms [B * G, T] to draw the tokens with, or None for greedy completions. An engine that
                draws its own random numbers ignores their values, and only checks whether `draws` is None.

        Returns:
            A `Rollout` of N = B * G rows, which end at an EOS of the policy or where one of its stop strings
            is complete. `prompt_index` counts the prompts from 0. The columns `logprobs`, `entropy`,
            `score_norms` and `hidden` are the trainer's own: what an engine of another kind than the default
            one writes there is not read.
        """
        raise NotImplementedError

    def over_turns(self) -> Generator:
        """Return what samples one batch of episodes, whose turns begin with what was sampled before."""
        return self

    def check(self, rows: Rollout, sampling: Sampling) -> None:
        """Compare sampled completions with the trainer, whose log-probabilities they have by now."""

    def announce(self, prompts: Any) -> None:
        """Take the prompts of the step after the next one, to sample them during the update."""

    def sync(self, policy: Policy) -> None:
        """Sample from the weights of this policy from now on; called at the start and after each step."""

    def close(self) -> None:
        """Free memory and processes; nothing is sampled afterwards. An error in it is only a warning."""


@dataclass(frozen=True)
class TransformersGenerator(Generator):
    """Samples from the policy's own model, so there are no weights to copy and nothing to free.

    The forward pass of each distinct prompt is computed once and its cache is repeated for the rows of the
    group. Rows that are finished leave the batch. With a `plain_cache`, the prompt is computed for each row and
    rows stay, so that the cache is only handed back to the model.

    Attributes:
        policy: the policy whose model is sampled from.
        rows_at_once: number of completions that are sampled at once, of whole groups, which bounds the memory
            of their caches and changes nothing else; None for all.
        cache: GiB of the keys and values that episodes keep from turn to turn; what does not fit is read again.
        prefixes: what it keeps of the rows that it samples, and need not read again; None to keep nothing.
        way: how the model is sampled. A run samples its own model in the way that it has tried at its start.
    """

    policy: Policy
    rows_at_once: int | None = None
    cache: float = 2.0
    prefixes: PrefixCache | None = None
    way: Way = USUAL

    def over_turns(self) -> TransformersGenerator:
        """Return the generator of one batch of episodes, which reads no history twice if its way allows it."""
        if not self.way.keeps_turns:
            return self
        return replace(self, prefixes=PrefixCache(self.cache * GIB))

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions as `Generator.generate` says; every field of the `Rollout` is filled.

        Only `score_norms`, `hidden`, `sampling_distribution` and `top_ids` are None unless `sampling` asks for
        them.

        Raises:
            Stopped: the model's logits are not finite.
        """
        size = sampling.group_size
        if draws is not None:
            draws = on_device(draws, self.policy.device)
        groups = len(prompt_ids)
        if self.rows_at_once is not None:
            groups = max(1, self.rows_at_once // size)
        modules = self.policy.model.modules()
        training = [m for m in modules if m.training]  # those that recompute, which keep no cache
        parts = []
        try:
            self.policy.model.eval()
            for start in range(0, len(prompt_ids), groups):
                end = start + groups
                uniforms = None if draws is None else draws[start * size : end * size]
                part = self._decode(prompt_ids[start:end], sampling, uniforms)
                parts.append(replace(part, prompt_index=part.prompt_index + start))
        finally:
            for module in training:
                module.training = True
        return cat(parts)

    def _decode(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample token by token; the batch holds only unfinished rows and, for a while, a few finished ones."""
        policy = self.policy
        prefixes = self.prefixes
        plain_cache = self.way.plain_cache
        device = policy.device
        length = sampling.max_completion_length
        prompt_ids, prompt_mask = pad_left(prompts, policy.pad_id)
        prompt_index = torch.arange(len(prompts)).repeat_interleave(sampling.group_size)
        decoder = Decoder(policy, prompts, prompt_index, sampling, prefixes, plain_cache)
        state: Decoder | FixedDecoder = decoder
        if self.way.token_steps is not None:
            state = self.way.token_steps.decoder(decoder, prompt_ids.shape[1] + length, draws)
        ended = None
        if prefixes is not None:
            ended = EndedRows([prompts[i] for i in prompt_index.tolist()], prefixes)
        tokens = _Tokens(len(prompt_index), length, policy)
        batch = torch.arange(len(prompt_index))  # rows that are still in the batch
        rows = to_device(batch, device)
        look_every = LOOK_EVERY.get(device.type, WINDOW)
        for start in range(0, length, look_every):
            end = min(start + look_every, length)
            uniforms = None if draws is None else draws[rows, start:end]
            columns = state.sample(uniforms, end - start)
            tokens.write(start, rows, columns)
            if policy.stops is not None:
                ids, mask = tokens.columns["ids"], tokens.columns["mask"]
                at_stops = _end_at_stops(policy.stops, ids, mask, start, end - 1)
                state.end(at_stops[rows])
            if end == length and ended is None:
                break
            unfinished = state.alive.cpu().nonzero().squeeze(1)
            if ended is not None:
                ended.take(state.cache, batch, unfinished, prompt_ids.shape[1] + end - 1, end - 1)
            if end == length or not len(unfinished):
                break
            # Copying the cache costs as much as keeping a few finished rows.
            if len(unfinished) <= 0.75 * len(rows) and not plain_cache:
                index = to_device(unfinished, device)
                state.select(index)
                rows = rows[index]
                batch = batch[unfinished]
        truncated = state.alive.new_zeros(len(prompt_index)).index_put((rows,), state.alive)
        rollout = tokens.rollout(
            policy.pad_id,
            prompt_ids=prompt_ids[prompt_index],
            prompt_mask=prompt_mask[prompt_index],
            prompt_index=prompt_index,
            truncated=truncated,
        )
        if ended is not None:
            ended.keep(rollout)
        return rollout.cut(prompt_ids.shape[1], int(rollout.mask.any(dim=0).sum()))


class LaggedGenerator(Generator):
    """Samples training from a copy of the policy, which gets the policy's weights before each k-th step.

    So do engines of other processes, which sample while an update is made. What is not training, such as an
    evaluation, is sampled from the policy itself.
    """

    def __init__(self, present: TransformersGenerator, every: int) -> None:
        """Copy the policy's model.

        Args:
            present: samples from the policy itself.
            every: k, 2 or more; step s samples from the weights before step `s - (s - 1) % k`.
        """
        policy = present.policy
        lagged = replace(policy, model=copied(policy.model), reference=None)
        self._present = present
        self._lagged = replace(present, policy=lagged)
        self._every = every

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions as `Generator.generate` says; the step of the sampling decides whose weights count.

        Columns of the trained policy are left open: the copy has other weights.
        """
        if (sampling.step - 1) % self._every == 0:  # never at step 0, as k is 2 or more
            self.load_state_dict(_trained(self._present.policy))
        engine = self._lagged if sampling.step else self._present
        rollout = engine.generate(prompt_ids, sampling, draws)
        return replace(rollout, logprobs=ABSENT, entropy=ABSENT, score_norms=None, hidden=None)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the copy that training changes, which a continuation samples from."""
        return _trained(self._lagged.policy)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Sample from saved weights on."""
        for name, weight in self.state_dict().items():
            weight.copy_(state[name])


def _trained(policy: Policy) -> dict[str, Tensor]:
    """Return the weights that are trained, by name, without autograd."""
    named = policy.model.named_parameters()
    return {name: weight.detach() for name, weight in named if weight.requires_grad}


class _Tokens:
    """The tokens of N completions that were drawn so far, with their numbers.

    Attributes:
        columns: `ids`; `mask`, True on tokens up to the end of their completion, behind which rows may go on;
            and columns of a `Rollout` by name. Each is [N, T, ...].
    """

    def __init__(self, rows: int, length: int, policy: Policy) -> None:
        ids = torch.full((rows, length), policy.pad_id, device=policy.device)
        self.columns = {"ids": ids, "mask": torch.zeros_like(ids, dtype=torch.bool)}

    def write(self, start: int, rows: Tensor, columns: Mapping[str, Tensor]) -> None:
        """Write what was sampled for some rows from position `start` on, as `Decoder.sample` returns it."""
        end = start + columns["ids"].shape[1]
        for name, x in columns.items():
            if name not in self.columns:
                self.columns[name] = x.new_zeros(*self.columns["ids"].shape, *x.shape[2:])
            self.columns[name][rows, start:end] = x

    def rollout(self, pad_id: int, **columns: Any) -> Rollout:
        """Return the rollout of the completions, on the host.

        Args:
            pad_id: the id behind the end of a completion.
            **columns: the columns of their prompts, and whether each has no end.

        Raises:
            Stopped: an entropy is not finite. A NaN in any logit of a row makes the entropy of the row NaN.
        """
        mask = self.columns["mask"]
        of_tokens: dict[str, Any] = {name: zeroed(x, mask) for name, x in self.columns.items()}
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
    ended = torch.zeros(len(ids), dtype=torch.bool)
    for position in range(start, end + 1):
        rows = host_mask[:, position].nonzero().squeeze(1)
        over = rows[stops.ended(host_ids, rows, position)]
        ended[over] = True
        host_mask[over, position + 1 :] = False
    mask.copy_(host_mask)
    return to_device(ended, ids.device)
