"""Samples the next token of each row of a batch.

The host is asked for nothing meanwhile, so that a device may compute several tokens before anyone waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.language.rollout.cache import Cache
from tokenrl.language.rollout.reading import Last, forward
from tokenrl.language.rollout.sampling import Sampling, draw

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy


@dataclass
class Batch:
    """R rows of which a token was drawn.

    Attributes:
        policy: the policy.
        sampling: how the rows are sampled.
        cache: the cache of the tokens that were fed to the model: all but the last one that was drawn.
        mask: True on these, and False on padding on their left [R, columns]; None without padding, and where the
            model takes none.
        position: how many tokens of each row were fed [R].
        eos: the ids that end a row.
        alive: True for the rows that have not ended [R].
        token: the last token that was drawn [R].
        keys: of a rule for completions, the key of the position of the next token, see `AllowedTokens` [R]; else None.
    """

    policy: Policy
    sampling: Sampling
    cache: Cache
    mask: Tensor | None
    position: Tensor
    eos: Tensor
    alive: Tensor
    token: Tensor
    keys: Tensor | None = None

    def select(self, index: Tensor) -> None:
        """Make the rows `index` the batch."""
        self.cache.select(index)
        self.position = self.position[index]
        self.alive = self.alive[index]
        self.token = self.token[index]
        if self.mask is not None:
            self.mask = self.mask[index]
        if self.keys is not None:
            self.keys = self.keys[index]

    def step(self, uniforms: Tensor | None) -> dict[str, Tensor]:
        """Feed each row its last token, and draw the next one; see `add`.

        Args:
            uniforms: random numbers [R]; None to take the most probable tokens.
        """
        positions = {}
        if self.mask is not None:
            self.mask = pad(self.mask, (0, 1), value=True)
            positions = {"attention_mask": self.mask, "position_ids": self.position[:, None]}
        options = {self.cache.name: self.cache.held, **positions}
        tokens = self.token[:, None]
        self.cache, last = forward(self.policy.model, self.sampling, tokens, **options)
        self.position = self.position + 1
        return self.add(drawn(self.sampling, last, uniforms, self.keys))

    def add(self, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add a token to each row.

        Args:
            numbers: the tokens with their numbers, as `drawn` returns them.

        Returns:
            The same, and `mask`, True on tokens of rows that had not ended before [R].
        """
        mask = self.alive
        self.token = numbers["ids"]
        self.alive = mask & ~torch.isin(self.token, self.eos)
        if "allowed_keys" in numbers:
            rules: Any = self.sampling.allowed
            self.keys = rules.following(numbers["allowed_keys"], self.token)[0]
        return {**numbers, "mask": mask}


def drawn(
    sampling: Sampling, last: Last, uniforms: Tensor | None, keys: Tensor | None
) -> dict[str, Tensor]:
    """Draw one token per row, and compute its columns of a `Rollout`; the host is not asked for anything.

    Args:
        sampling: the distribution, and which columns are kept.
        last: what follows the last token of n rows.
        uniforms: random numbers [n]; None to take the most probable token.
        keys: of a rule for completions, the keys of the positions of the tokens [n]; else None.

    Returns:
        The tokens, `ids` [n], and the columns [n, ...].
    """
    logp = sampling.log_probabilities(last.logits, keys=keys)
    p = logp.exp()
    token = logp.argmax(dim=-1) if uniforms is None else draw(p, uniforms)
    logprobs = logp.gather(1, token[:, None]).squeeze(1)
    numbers = {"ids": token, "logprobs": logprobs, "entropy": entropy_of(logp, p)}
    if keys is not None:
        numbers["allowed_keys"] = keys
    if sampling.keep_score_norms:
        numbers["score_norms"] = score_norm_of(logprobs, p)
    if sampling.keep_hidden:
        numbers["hidden"] = last.hidden
    if sampling.keep_distribution:
        numbers["sampling_distribution"] = logp
    return numbers
