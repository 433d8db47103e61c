"""Describes how completions are sampled, as one value that callers pass on whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from tokenrl.settings import Bounds, Count, Natural, Positive, Settings

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy


@dataclass(frozen=True)
class Sampling(Settings):
    """Settings that, with the weights and the prompts, decide which completions are sampled.

    Attributes:
        max_completion_length: T, the most tokens that a completion may have, EOS included; at least 1.
        num_generations: G, the number of completions per prompt; 0 means only the greedy completion.
        temperature: the logits are divided by it before the softmax; above 0. It is part of the policy: the
            same temperature is used for sampling and for scoring.
        seed: seed of the random numbers, from 0 to 2**60 - 1. Code that samples also names a stream (see
            `streams`), so that different purposes with one seed use different numbers.
        step: step of the run, at least 0. Training draws new random numbers in each step; rewards can read
            the step as `trainer_state.global_step`.
        truncate_prompts: drop tokens from the left of prompts that are too long, instead of refusing them.
        keep_score_norms: also return the squared norms of the scores, which the optimal baselines read. What
            a generator cannot return is left to a scoring pass.
        keep_hidden: also return the last hidden states, which a critic reads.

    Raises:
        Refused: a number is out of range.
    """

    max_completion_length: Count
    num_generations: Natural = 1
    temperature: Positive = 1.0
    seed: Annotated[int, Bounds(at_least=0, at_most=2**60 - 1)] = 0
    step: Natural = 0
    truncate_prompts: bool = False
    keep_score_norms: bool = False
    keep_hidden: bool = False

    @property
    def group_size(self) -> int:
        """Number of rows per prompt: G sampled completions, or the greedy one."""
        return max(1, self.num_generations)


def encode(policy: Policy, prompts: Sequence[Any], sampling: Sampling) -> list[list[int]]:
    """Token ids of prompts (text or chat messages), each short enough for a completion to follow it.

    Raises:
        Refused: a prompt and its completion could exceed the model's context; the message names the row and
            the lengths.
    """
    return policy.encode_all(
        prompts,
        max_completion_length=sampling.max_completion_length,
        truncate=sampling.truncate_prompts,
    )
