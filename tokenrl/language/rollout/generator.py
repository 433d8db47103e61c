"""Samples completions: the base class `Generator`, and the default, which samples from the policy's own model.

Tokens are drawn by inverting the CDF at uniform random numbers that are fixed by (stream, seed, step, prompt,
generation, position). A completion therefore depends neither on the other rows of its batch nor on the number
of processes, and two estimators can be compared on common random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from tokenrl.errors import Refused
from tokenrl.language.policy.copies import copied
from tokenrl.language.rollout.decoding import decode
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.reading import Histories
from tokenrl.language.rollout.rollout import ABSENT, Rollout, cat
from tokenrl.language.rollout.sampling import Sampling, on_device
from tokenrl.language.rollout.scoring import USUAL, Regime

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy

GIB = 2**30


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
        options: the fields of `Distribution` that it samples with; the others must have their defaults. Only the
            default engine samples with `allowed`.
    """

    exact: bool = True
    agrees: bool = False
    distributed: bool = True
    min_p_last: bool = True
    temperatures: tuple[float, float] = (0.0, math.inf)
    options: tuple[str, ...] = ("temperature", "top_k", "top_p", "min_p")

    def check(self, distribution: Distribution, engine: str) -> None:
        """Refuse a distribution of tokens that an engine does not sample from, under the engine's name."""
        for option in fields(Distribution):
            value = getattr(distribution, option.name)
            if option.name not in self.options and value != option.default:
                raise Refused(
                    f"{option.name} was given as {value}; {engine} does not sample with it: take transformers."
                )
        if distribution.top_p < 1 and distribution.min_p and not self.min_p_last:
            raise Refused(
                f"{engine} applies min_p before top_p, and scoring after it: give top_p or min_p, not both."
            )
        lowest, highest = self.temperatures
        if not lowest <= distribution.temperature <= highest:
            raise Refused(
                f"temperature was given as {distribution.temperature:g}; {engine} samples from {lowest:g} to "
                f"{highest:g}."
            )


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

    def turn(
        self,
        rows: Sequence[int],
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        draws: Tensor | None,
    ) -> Rollout:
        """Sample a turn of some episodes of a batch, as `generate` does.

        Args:
            rows: their numbers in the batch.
            prompt_ids: all tokens of each so far.
            sampling: how they are sampled, with one completion each.
            draws: uniforms as for `generate`.
        """
        return self.generate(prompt_ids, sampling, draws)

    def check(self, rows: Rollout, sampling: Sampling) -> None:
        """Compare sampled completions with the trainer, whose log-probabilities they have by now."""

    def settle(self) -> dict[str, float]:
        """Return metrics of all that was sampled for the present step."""
        return {}

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
        histories: what the rows of a batch of episodes have read, by their numbers; None to keep nothing.
        regime: how the model is sampled. A run has tried it on its own model at its start.
    """

    abilities = Abilities(options=tuple(option.name for option in fields(Distribution)))

    policy: Policy
    rows_at_once: int | None = None
    cache: float = 2.0
    histories: Histories | None = None
    regime: Regime = USUAL

    def over_turns(self) -> TransformersGenerator:
        """Return the generator of a batch of episodes; with `keeps_turns` it reads no history twice."""
        return (
            replace(self, histories=Histories(self.cache * GIB))
            if self.regime.keeps_turns
            else self
        )

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions as `Generator.generate` says; every field of the `Rollout` is filled.

        Only `score_norms`, `hidden` and `sampling_distribution` are None unless `sampling` asks for them.

        Raises:
            Stopped: the model's logits are not finite.
        """
        return self.turn([], prompt_ids, sampling, draws)

    @torch.no_grad()
    def turn(
        self,
        rows: Sequence[int],
        prompt_ids: Sequence[Sequence[int]],
        sampling: Sampling,
        draws: Tensor | None,
    ) -> Rollout:
        """Sample a turn of episodes as `Generator.turn` says, and keep what its rows have read for the next one.

        Rows without numbers are of no episode, and nothing of them is kept.
        """
        histories = self.histories if rows else None
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
                of_part = (
                    rows[start:end],
                    prompt_ids[start:end],
                    sampling.of_prompts(slice(start, end)),
                )
                part = decode(self.policy, self.regime, histories, *of_part, uniforms)
                parts.append(replace(part, prompt_index=part.prompt_index + start))
        finally:
            for module in training:
                module.training = True
        return cat(parts)


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
