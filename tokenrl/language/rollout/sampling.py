"""How completions are sampled: one value that every caller passes on whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenrl.settings import check_number

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy


@dataclass(frozen=True)
class Sampling:
    """What decides which completions a policy samples, besides its weights and the prompts.

    Attributes:
        max_completion_length: T, the most tokens a completion may have, EOS included.
        num_generations: G, completions of each prompt; 0 is the greedy completion alone.
        temperature: divides the logits before the softmax; part of the policy that is sampled and scored.
        seed: seed of the random numbers; the stream they come from (see `streams`) is named where they are
            drawn.
        step: step of the run. Rewards that ask are told of it, and training draws new numbers in each step.
        truncate_prompts: drop tokens from the left of prompts that are too long, instead of refusing them.
        keep_hidden: also return the last hidden states, which a critic reads. A generator that has none
            leaves them to a scoring pass.

    Raises:
        Refused: a number out of range.
    """

    max_completion_length: int
    num_generations: int = 1
    temperature: float = 1.0
    seed: int = 0
    step: int = 0
    truncate_prompts: bool = False
    keep_hidden: bool = False

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        check_number("max_completion_length", self.max_completion_length, at_least=1)
        check_number("temperature", self.temperature, above=0)
        for name in ("num_generations", "seed", "step"):
            check_number(name, getattr(self, name), at_least=0)

    @property
    def group_size(self) -> int:
        """Rows of each prompt: its sampled completions, or the greedy one."""
        return max(1, self.num_generations)


def encode(policy: Policy, prompts: Sequence[Any], sampling: Sampling) -> list[list[int]]:
    """Token ids of prompts (text or chat messages), each short enough for a completion to follow it.

    Raises:
        Refused: prompt and completion together exceed the context; the message names row and lengths.
    """
    return policy.encode_all(
        prompts,
        max_completion_length=sampling.max_completion_length,
        truncate=sampling.truncate_prompts,
    )
