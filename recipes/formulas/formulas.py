"""Formulas in prefix notation, a character for each token: which tokens may follow, and how well a formula fits.

A row of the data holds a prompt with all tokens, the names of the variables, the value of each variable at some
points, and the `target` there. `rule` says which tokens may follow, as in Deep Symbolic Regression (Petersen et al.
2021, arXiv 1912.04871): 4 to 30 tokens, no sine or cosine inside another, no exponential of a logarithm or the
other way round. `fit` rewards a formula by 1 / (1 + NRMSE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenrl.language import Automaton

BINARY = {"+": np.add, "-": np.subtract, "*": np.multiply, "/": np.divide}
UNARY = {"s": np.sin, "c": np.cos, "e": np.exp, "l": np.log}
OPERATIONS = BINARY | UNARY
ARITY = dict.fromkeys(BINARY, 2) | dict.fromkeys(UNARY, 1)
INVERSE = {"e": "l", "l": "e"}
SHORTEST, LONGEST = 4, 30
"""The least and the most tokens of a formula."""

State = tuple[int, int, int, str]


def rule(row: Mapping[str, Any]) -> Automaton:
    """Return which tokens may follow in the formulas of a row's variables.

    A state is the number of tokens so far, up to the shortest formula; the number of open arguments; how many were
    open where a sine or cosine began that is not complete, or 0; and the last token if it has an inverse.
    """
    states: list[State] = [(0, 1, 0, "")]
    numbers = {states[0]: 0}
    edges = []
    for state in states:  # which grow meanwhile
        following = {token: after(state, token) for token in [*ARITY, *row["variables"]]}
        edges.append({})
        for token, target in following.items():
            if target is None:
                continue
            if target not in numbers:
                numbers[target] = len(states)
                states.append(target)
            edges[-1][token] = numbers[target]
    return Automaton(edges, [number for state, number in numbers.items() if not state[1]])


def after(state: State, token: str) -> State | None:
    """Return the state after a token; None if the token may not stand there."""
    length, missing, trigonometric, last = state
    count = min(SHORTEST, length + 1)
    missing_after = missing - 1 + ARITY.get(token, 0)
    is_over = missing == 0 or (missing_after == 0 and count < SHORTEST)
    if is_over or 2 * missing_after > LONGEST or INVERSE.get(token) == last:
        return None
    if token in "sc":
        return None if trigonometric else (count, missing_after, missing, "")
    inside = trigonometric if missing_after >= trigonometric else 0
    return count, missing_after, inside, token if token in INVERSE else ""


def values(formula: str, memory: dict[str, Any]) -> np.ndarray:
    """Return the values of a formula at some points.

    Args:
        formula: the formula in prefix notation.
        memory: the values of each variable, and of formulas by their texts, which this one and its parts join.
    """
    stack: list[str] = []
    for token in reversed(formula):
        arguments = [stack.pop() for _ in range(ARITY.get(token, 0))]
        text = token + "".join(arguments)
        if text not in memory:
            memory[text] = OPERATIONS[token](*(memory[part] for part in arguments))
        stack.append(text)
    return memory[stack.pop()]


def is_whole(text: str, variables: str) -> bool:
    """Return whether a text is one whole formula of some variables, whatever else the rule asks."""
    missing = 1
    for token in text:
        if missing == 0 or token not in (*ARITY, *variables):
            return False
        missing += ARITY.get(token, 0) - 1
    return missing == 0


def infix(formula: str, names: Mapping[str, str] | None = None) -> str:
    """Return a formula in prefix notation as it is usually written.

    Args:
        formula: the formula in prefix notation.
        names: what its variables are called; None for their letters.
    """
    names = {"s": "sin", "c": "cos", "e": "exp", "l": "log", **(names or {})}
    stack: list[str] = []
    for token in reversed(formula):
        arguments = [stack.pop() for _ in range(ARITY.get(token, 0))]
        name = names.get(token, token)
        if token in BINARY:
            stack.append(f"({arguments[0]} {token} {arguments[1]})")
        else:
            stack.append(f"{name}({arguments[0]})" if arguments else name)
    return stack.pop()


def fit(
    completions: Sequence[str], variables: Sequence[str], target: Sequence[Any], **columns: Any
) -> list[float]:
    """Return 1 / (1 + NRMSE) of each formula at the points of its row; 0 where it is not finite, or no formula.

    NRMSE is the root of the mean squared error, divided by the standard deviation of the targets.
    """
    rewards = []
    rows: dict[Any, Any] = {}  # what completions of a row share
    for number, formula in enumerate(completions):
        if not is_whole(formula, variables[number]):
            rewards.append(0.0)
            continue
        points = {name: tuple(columns[name][number]) for name in variables[number]}
        key = tuple(target[number]), *points.values()
        if key not in rows:
            memory = {name: np.asarray(x) for name, x in points.items()}
            rows[key] = memory, np.asarray(target[number]), np.std(target[number])
        memory, wanted, spread = rows[key]
        with np.errstate(all="ignore"):
            error = np.sqrt(np.mean((values(formula, memory) - wanted) ** 2)) / spread
        rewards.append(float(1 / (1 + error)) if np.isfinite(error) else 0.0)
    return rewards
