"""What a rule about numbers says: a finding with its weight, and the table that rules are entered into."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenrl.runs.facts import Facts

Weight = Literal["watch", "act", "void"]


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        flag: a short name for programs, such as `policy-destroyed`.
        weight: `watch` is a remark; `act` says that a setting should change; `void` says that the numbers
            mean nothing as they are: a check is then not passed, and an arm gets no verdict.
        text: one or more whole sentences, with the numbers.
        changes: the settings to change, by name, such as `{"estimator.entropy_coef": 0.01}`.
    """

    flag: str
    weight: Weight
    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the finding as one line, its flag first."""
        return f"{self.flag}: {self.text}"


Judgement = tuple[Weight | None, str, Mapping[str, Any]]
"""What a rule returns: the weight (None for nothing), the sentence with facts in braces, the changes."""
RULES: list[tuple[str, Callable[[Facts], Judgement]]] = []
"""The table: a flag and its rule, in the order in which findings are told."""


def rule(flag: str) -> Callable[[Callable[[Facts], Judgement]], Callable[[Facts], Judgement]]:
    """Enter a rule into the table under a flag."""

    def entered(function: Callable[[Facts], Judgement]) -> Callable[[Facts], Judgement]:
        RULES.append((flag, function))
        return function

    return entered


def above(
    number: float, *, watch: float = math.inf, act: float = math.inf, void: float = math.inf
) -> Weight | None:
    """Return the gravest weight whose limit a number exceeds; None if it exceeds none."""
    return "void" if number > void else "act" if number > act else "watch" if number > watch else None
