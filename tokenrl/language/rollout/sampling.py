"""Describes how completions are sampled, as one value, makes their random numbers, and draws tokens with them.

A token is drawn by inverting the CDF of the probabilities at a uniform random number. All sampling of tokens takes
these numbers from here. Each purpose (training, evaluation, ...) has a stream of its own, so that two purposes with
the same seed never share a random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenrl.errors import locations_of
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.rollout import to_device
from tokenrl.settings import Bounds, Count, Natural

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy

S = TypeVar("S", bound="Sampling")
STREAMS = {
    "training": 0,
    "interactive": 0,
    "preferences": 2**60,
    "measurement": 2**62,
    "probe": 2**62 + 2**61,
    "evaluation": 2**63,
    "best_of_n": 2**63 + 2**62,
}
"""The number that each stream adds to the seed.

Different numbers are at least 2**60 apart, so no seed leads from one stream into another.
Only training draws new random numbers in each step, and its steps count from 1. All other streams always use
those of step 0, so that two evaluations of one run are compared on common random numbers. The stream
"interactive" shares its number with training, and is separate because training never uses step 0.
"""
BLOCK = 256
"""Tokens of a block; a larger vocabulary is drawn from in two steps, first a block and then a token of it."""
UNIT, UNIFORM_BITS = 40, 31
"""On a device probabilities are whole numbers of 2**-UNIT, and uniforms whole numbers of 2**-UNIFORM_BITS."""


@dataclass(frozen=True)
class Sampling(Distribution):
    """Settings that, with the weights and the prompts, decide which completions are sampled.

    Attributes:
        max_completion_length: T, the most tokens that a completion may have, EOS included; at least 1.
        num_generations: G, the number of completions per prompt; 0 means only the greedy completion.
        temperature, top_k, top_p, min_p, allowed: the distribution of tokens, see `Distribution`; by keyword only. It
            is part of the policy: completions are sampled and scored under the same distribution.
        seed: seed of the random numbers, from 0 to 2**60 - 1. Code that samples also names a stream (see
            `STREAMS`), so that different purposes with one seed use different numbers.
        step: step of a training that samples, from 1, which draws new random numbers; else 0.
        truncate_prompts: drop tokens from the left of prompts that are too long, instead of refusing them.
        keep_score_norms: also return the squared norms of the scores, which the optimal baselines read. What
            a generator cannot return is left to a scoring pass.
        keep_hidden: also return the last hidden states, which a critic reads.
        keep_distribution: also return the log-probabilities of all tokens, for centred scores; only the default
            generator does so.

    Raises:
        Refused: a number is out of range.
    """

    max_completion_length: Count
    num_generations: Natural = 1
    seed: Annotated[int, Bounds(at_least=0, at_most=2**60 - 1)] = 0
    step: Natural = 0
    truncate_prompts: bool = False
    keep_score_norms: bool = False
    keep_hidden: bool = False
    keep_distribution: bool = False

    @property
    def group_size(self) -> int:
        """Number of rows per prompt: G sampled completions, or the greedy one."""
        return max(1, self.num_generations)

    def beginning(self: S, data: Sequence[Any]) -> S:
        """Return the sampling of completions of these rows of the data, in this order, where a rule allows some.

        The rule has been read (`with_allowed`).
        """
        if not self.allowed:
            return self
        rules: Any = self.allowed
        return replace(self, allowed=rules.beginning(data, self.max_completion_length))

    def of_prompts(self: S, prompts: slice) -> S:
        """Return the sampling of some of the prompts of a call, where a rule allows some completions."""
        rules: Any = self.allowed
        return (
            replace(self, allowed=replace(rules, begins=rules.begins[prompts])) if rules else self
        )


def encode(
    policy: Policy,
    data: Sequence[Any],
    sampling: Sampling,
    locations: Sequence[str] | None = None,
    **options: str,
) -> list[list[int]]:
    """Token ids of the prompts of rows, each short enough for a completion to follow it.

    Args:
        policy: the policy.
        data: the rows, with a `prompt` (text or chat messages) and perhaps `tools`.
        sampling: how they are completed.
        locations: where each prompt stands, for the message of a refusal; None for where the data says.
        **options: the `remedy` of `encode_all`.

    Raises:
        Refused: a prompt and its completion could exceed the model's context; the message names the row and
            the lengths.
    """
    return policy.encode_all(
        [row["prompt"] for row in data],
        max_completion_length=sampling.max_completion_length,
        truncate=sampling.truncate_prompts,
        locations=locations_of(data) if locations is None else locations,
        tools=[row.get("tools") for row in data],
        **options,
    )


def uniforms(stream: str, sampling: Sampling, prompts: Sequence[int]) -> Tensor | None:
    """Uniform random numbers in [0, 1) for one call of a generator, one for each token.

    Each number depends only on the stream, the seed, the step (in training), the prompt, the generation and
    the position of the token. A completion is therefore the same whatever else is sampled in the same call.

    Args:
        stream: a name in `STREAMS`.
        sampling: gives the seed, the step, G and T.
        prompts: a number that identifies each of the B prompts, such as its position in the prompt stream.

    Returns:
        float64 [B * G, T], or None for greedy completions, which need no random numbers.

    Raises:
        ValueError: the stream is "training" and the step is 0, whose numbers belong to another stream.
    """
    if not sampling.num_generations:
        return None
    key = key_of(stream, sampling)
    rows = []
    for prompt in prompts:
        for g in range(sampling.num_generations):
            # A counter for each completion, which depends on neither G nor T.
            bits = np.random.Philox(key=key, counter=np.array([0, g, prompt, 0], dtype=np.uint64))
            rows.append(np.random.Generator(bits).random(sampling.max_completion_length))
    return torch.from_numpy(np.stack(rows))


def key_of(stream: str, sampling: Sampling) -> np.ndarray:
    """Key of Philox (Salmon et al. 2011): the seed plus the stream's number, and in training the step."""
    if stream == "training" and sampling.step < 1:
        raise ValueError("the steps of training count from 1; step 0 belongs to another stream")
    step = sampling.step if stream == "training" else 0
    return np.array([STREAMS[stream] + sampling.seed, step], dtype=np.uint64)


def on_device(uniforms: Tensor, device: torch.device) -> Tensor:
    """Return uniforms [N, T] as `draw` takes them: float64 on a CPU, whole numbers on a device."""
    if device.type == "cpu":
        return uniforms
    return to_device((uniforms * 2**UNIFORM_BITS).long(), device)


def draw(p: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting the CDF; a token of probability 0 is never drawn.

    With the rounding errors of float32, a CDF could draw another token, or one of probability 0 where a
    device adds in another order. So the sums are in float64 on a CPU. A device may have no float64; there the
    probabilities are whole numbers, whose sums are exact. For a large vocabulary a CPU converts only the sums
    of blocks, and the probabilities of one block per row.

    Args:
        p: probabilities [n, V].
        uniforms: random numbers in [0, 1) [n], in float64 or as whole numbers of 2**-UNIFORM_BITS.

    Returns:
        The tokens [n].
    """
    exact = not uniforms.is_floating_point()
    if exact:
        p = (p * 2**UNIT).long()
    vocabulary = p.shape[1]
    if vocabulary <= BLOCK:
        cdf = p.to(uniforms.dtype).cumsum(dim=1)
        return _invert(cdf, _threshold(cdf[:, -1], uniforms))
    whole = vocabulary // BLOCK * BLOCK
    sums = p[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=2)  # [n, blocks]
    if whole < vocabulary:
        sums = torch.cat([sums, p[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    cdf = sums.to(uniforms.dtype).cumsum(dim=1)
    threshold = _threshold(cdf[:, -1], uniforms)
    block = _invert(cdf, threshold)
    inside = block[:, None] * BLOCK + torch.arange(BLOCK, device=p.device)  # [n, BLOCK]
    values = torch.where(inside < vocabulary, p.gather(1, inside.clamp(max=vocabulary - 1)), 0)
    chosen = sums.gather(1, block[:, None]).to(uniforms.dtype).squeeze(1)
    rest = threshold - (cdf.gather(1, block[:, None]).squeeze(1) - chosen)
    cdf = values.to(uniforms.dtype).cumsum(dim=1)
    if not exact:  # what is left of the uniform within its block is again uniform
        share = (rest / chosen).clamp(0, 1 - torch.finfo(uniforms.dtype).eps)
        rest = _threshold(cdf[:, -1], share)
    return block * BLOCK + _invert(cdf, rest)


def _threshold(total: Tensor, uniforms: Tensor) -> Tensor:
    """Return the product of a CDF's total [n] and the uniforms [n], which is below the total."""
    if uniforms.is_floating_point():
        return uniforms * total  # rounding leaves the total near 1 and not at 1
    # So many bits of the total are left out that the product has 63 bits.
    spare = UNIT - UNIFORM_BITS
    return ((total >> spare) * uniforms) >> (UNIFORM_BITS - spare)


def _invert(cdf: Tensor, threshold: Tensor) -> Tensor:
    """Return in each row the first entry [n] below whose end in the CDF [n, V] the threshold [n] lies."""
    # right=True finds the first entry above the threshold, so a token of probability 0 is never chosen.
    index = torch.searchsorted(cdf, threshold[:, None], right=True).squeeze(1)
    return index.clamp(max=cdf.shape[1] - 1)
