"""Reads regular expressions and JSON schemas as automata over bytes, with the package outlines-core."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from tokenrl.errors import Refused, describe, refusing

REMEDY = (
    "Regular expressions are those of Rust's regex: without looking ahead or behind, references back, or ^ and $ "
    "inside. Schemas have few of JSON Schema's words. What they cannot say, an Automaton can."
)

NOTES = "title description default examples deprecated readOnly writeOnly $schema $id $comment $defs definitions"
"""Words of JSON Schema that allow and forbid nothing."""
SCHEMAS = """\
properties type required additionalProperties
anyOf
prefixItems type
enum type
const type
$ref
minLength maxLength type
maxLength type
pattern type
format type
type items minItems maxItems additionalProperties minDigits maxDigits minDigitsInteger maxDigitsInteger\
 minDigitsFraction maxDigitsFraction minDigitsExponent maxDigitsExponent""".splitlines()
"""Words of JSON Schema that the library understands beside the first of the line; the first line counts."""


def byte_automaton(rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the automaton over bytes of a regular expression, or of the text of a JSON schema.

    State 1 is that before the first byte, and state 0 that from which nothing leads on.

    Returns:
        The next state by state and byte [S, 256], and the accepting states, with 0 for the start [S].
    """
    try:
        from outlines_core import Index, Vocabulary
        from outlines_core.json_schema import build_regex_from_schema
    except ImportError as error:
        raise Refused(
            f"A regular expression or a JSON schema for completions needs the package outlines-core "
            f"({describe(error)}): pip install 'tokenrl-lm[allowed]'."
        ) from error
    with refusing(f"The rule {rule!r:.200} for completions cannot be read", REMEDY):
        pattern = rule
        if rule.startswith("{"):
            if words := ", ".join(_ignored(json.loads(rule))):
                raise ValueError(f"it cannot be held to {words}")
            pattern = build_regex_from_schema(rule)
        # Of several ways to go on the library takes the first that ends, but for \z. It cannot begin with a
        # condition, so two bytes stand in front, and it searches texts for matches in time that may grow
        # exponentially, but for an empty one that is always there.
        whole = rf"\x00\x00(?:{pattern.removeprefix('^')})\z|"
        words_of_bytes = {bytes([byte]): [byte] for byte in range(256)} | {b"\0\0": [257]}
        index = Index(whole, Vocabulary(256, words_of_bytes))
        states = [index.get_next_state(index.get_initial_state(), 257)]
    moves = index.get_transitions()
    numbers = {states[0]: 1}
    edges = []
    for state in states:
        for byte, target in sorted(moves.get(state, {}).items()):
            if byte < 256:
                if target not in numbers:
                    numbers[target] = len(states) + 1
                    states.append(target)
                edges.append((numbers[state], byte, numbers[target]))
    table = np.zeros((len(states) + 1, 256), dtype=np.int32)
    sources, by, targets = np.array(edges, dtype=int).reshape(-1, 3).T
    table[sources, by] = targets
    accepting = np.isin([states[0], *states], [*index.get_final_states()])
    return table, accepting


def _ignored(schema: Any) -> Iterator[str]:
    """Yield the words of a JSON schema that the library would ignore, or read otherwise than JSON Schema."""
    if not isinstance(schema, dict):
        return
    words = schema.keys() - {*NOTES.split()}
    allowed = next((row.split() for row in SCHEMAS if row.split()[0] in words), ())
    yield from sorted(words - {*allowed})
    if "properties" in words:
        yield from sorted({*schema.get("required", ())} - schema["properties"].keys())
    for word in schema.keys() & {"properties", "$defs", "definitions"}:
        for part in schema[word].values():
            yield from _ignored(part)
    for word in sorted(words):
        parts = schema[word] if isinstance(schema[word], list) else [schema[word]]
        for part in parts:
            if word in ("anyOf", "items", "prefixItems", "additionalProperties"):
                yield from _ignored(part)
