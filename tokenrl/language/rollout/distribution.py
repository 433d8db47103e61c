"""Defines the distribution of the next token, for sampling and for scoring alike. Imports no torch.

The logits are divided by the temperature, some tokens are kept, and the softmax is over these. They are those
that top_k, top_p and min_p all keep, in the order of transformers: top_p counts probabilities among the top_k
tokens, and min_p comes last; vLLM applies min_p first, so that top_p counts among fewer. Tokens with equal
logits are kept or left out together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

from tokenrl.settings import Bounds, Natural, Positive, Settings

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Distribution(Settings, group="sampling"):
    """How completions are sampled, and scored alike: from which tokens, with which probabilities."""

    temperature: Positive = 1.0
    """Temperature of the policy, in sampling and in the gradient."""
    top_k: Natural = 0
    """Sample from the k most probable tokens, and score under the same distribution; 0: off."""
    top_p: Annotated[float, Bounds(above=0, at_most=1)] = 1.0
    """Sample from the fewest most probable tokens whose probabilities add up to this; 1: off. They are scored
    under the same distribution, so the gradient is that of the policy that was sampled."""
    min_p: Annotated[float, Bounds(at_least=0, below=1)] = 0.0
    """Sample from the tokens of at least this share of the highest probability, and score under the same
    distribution; 0: off."""

    @property
    def whole(self) -> Distribution:
        """The same temperature over all tokens: a reference is scored so, whose kept tokens are others."""
        return Distribution(temperature=self.temperature)

    @property
    def is_whole(self) -> bool:
        """Whether every token may be sampled."""
        return (self.top_k, self.top_p, self.min_p) == (0, 1, 0)

    def log_probabilities(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return log-probabilities [..., V] of logits [..., V], computed in float32 or better.

        Args:
            logits: the logits.
            ids: tokens that were chosen from them, which are always kept [...]; see `truncated`.
        """
        # The logsumexp over a large vocabulary loses too many digits in half precision.
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        return self.truncated(logits, ids).log_softmax(-1)

    def truncated(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return logits [..., V] at the temperature, with -inf in place of those that are not kept.

        Which tokens are kept is a constant: no gradient flows through that choice. A token that was chosen is
        always kept. Sampler and trainer may round differently, and after an update other tokens are kept than
        when the token was sampled; its probability would be 0 then.
        """
        if self.is_whole:
            return logits
        removed = logits < self._least(logits.detach())
        if ids is not None:
            removed = removed.scatter(-1, ids[..., None], False)
        return logits.masked_fill(removed, -math.inf)

    def _least(self, logits: Tensor) -> Tensor:
        """Return the least of logits [..., V] that is kept [..., 1]."""
        vocabulary = logits.shape[-1]
        ordered = logits.topk(min(self.top_k or vocabulary, vocabulary)).values
        nucleus = ordered
        if self.top_p < 1:
            p = ordered.softmax(-1)
            before = p.cumsum(-1) - p  # 0 for the first token, which is therefore always kept
            nucleus = ordered.masked_fill(before >= self.top_p, math.inf)
        least = nucleus.amin(-1, keepdim=True)
        if self.min_p:
            least = least.clamp(min=ordered[..., :1] + math.log(self.min_p))
        return least


def distribution_of(arguments: Any) -> dict[str, Any]:
    """Return the fields of a `Distribution` that arguments hold, by name, without those that are None."""
    values = {field.name: getattr(arguments, field.name) for field in fields(Distribution)}
    return {name: value for name, value in values.items() if value is not None}
