"""Defines the distribution of the next token, for sampling and for scoring alike. Imports no torch.

The logits are divided by the temperature, some tokens are kept, and the softmax is over these. They are those
that top_k, top_p and min_p all keep, in the order of transformers: top_p counts probabilities among the top_k
tokens, and min_p comes last; vLLM applies min_p first, so that top_p counts among fewer. Tokens with equal
logits are kept or left out together. Before all that, tokens that are not allowed where they would stand get the
probability 0 (see `allowed`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tokenrl.errors import Refused, read_file, refusing
from tokenrl.language.policy.automata import Automaton
from tokenrl.names import NamesCode, source_of
from tokenrl.settings import OR_OBJECT, Bounds, Natural, Positive, Settings, shown

if TYPE_CHECKING:
    from torch import Tensor

COLUMN = "choices:"
"""How a rule begins that names the column of the data with the choices of each row."""


def file_of_rule(rule: str) -> str:
    """Return the file of the function that a rule names; empty if it names none."""
    return source_of(rule) if re.search(r"\.py:[\w.]+$", rule) else ""


def text_of_rule(rule: Any) -> Any:
    """Return a rule as the text that a run saves; only a function stays as it is.

    A file that ends in .json is replaced by the schema that it holds; a name without a file stays.

    Raises:
        Refused: the file cannot be read or holds no object, or the rule is of another type.
    """
    if isinstance(rule, str) and rule.endswith(".json") and Path(rule).exists():
        remedy = "Give a file with an object of JSON."
        with refusing(f"allowed: no JSON schema could be read from {rule}", remedy):
            rule = {**json.loads(read_file(Path(rule)))}
    if isinstance(rule, Automaton):  # pairs, as JSON would turn ids that are names into texts
        edges = [[*map(list, of_state.items())] for of_state in rule.edges]
        rule = {"edges": edges, "accepting": [*rule.accepting]}
    if isinstance(rule, Mapping):
        return json.dumps(rule)
    if isinstance(rule, str) or callable(rule) or hasattr(rule, "begins"):  # of `AllowedTokens`
        return rule
    raise Refused(
        f"allowed was given as {shown(rule)}; it must be a regular expression, {COLUMN}COLUMN, a JSON schema as a "
        ".json file or a dict, an Automaton, or a function of a row that returns one of these or a list of choices."
    )


Rule = Annotated[str, OR_OBJECT, NamesCode(file_of_rule)]
"""The type of a field with a rule for completions, see `text_of_rule`."""


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
    allowed: Rule = ""
    """Sample only completions that a rule allows, and score them under the same distribution: a regular expression of
    the whole completion; a .json file with a JSON schema; choices:COLUMN, the lists of texts in a column of the data;
    or `file.py:function`, of a row, which returns one of these, a list of texts or an Automaton. A token from which
    the completion could not end in time is not allowed either, so no completion is cut. Regular expressions and
    schemas need the extra allowed. Of the generators only transformers samples so."""

    def __post_init__(self) -> None:
        """Check the values, and read the file of a schema, so that a run saves what it holds."""
        super().__post_init__()
        if self.allowed:
            object.__setattr__(self, "allowed", text_of_rule(self.allowed))

    @property
    def whole(self) -> Distribution:
        """The same temperature over all tokens that are allowed: a reference is scored so, which keeps others."""
        return Distribution(temperature=self.temperature, allowed=self.allowed)

    @property
    def is_whole(self) -> bool:
        """Whether every token that is allowed may be sampled."""
        return (self.top_k, self.top_p, self.min_p) == (0, 1, 0)

    def log_probabilities(
        self, logits: Tensor, ids: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Return log-probabilities [..., V] of logits [..., V], computed in float32 or better.

        Args:
            logits: the logits.
            ids: tokens that were chosen from them, which are always kept [...]; see `truncated`.
            keys: of a rule, the keys of the positions [...]; see `AllowedTokens`.
        """
        # The logsumexp over a large vocabulary loses too many digits in half precision.
        if logits.dtype.itemsize < 4:
            logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        return self.truncated(logits, ids, keys).log_softmax(-1)

    def truncated(
        self, logits: Tensor, ids: Tensor | None = None, keys: Tensor | None = None
    ) -> Tensor:
        """Return logits [..., V] at the temperature, with -inf in place of those that are not kept.

        Which tokens are kept is a constant: no gradient flows through that choice. A token that was chosen is
        always kept. Sampler and trainer may round differently, and after an update other tokens are kept than
        when the token was sampled; its probability would be 0 then.
        """
        if self.allowed:
            rules: Any = self.allowed  # which are `AllowedTokens` by now
            logits = rules.restricted(logits, keys)
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
