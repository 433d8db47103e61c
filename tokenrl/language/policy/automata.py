"""Makes automata over token ids from rules for completions: choices, a regular expression, a JSON schema.

The automata that it returns have, in place of texts, tuples of the ids of all tokens that act alike. Imports no torch
at once.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from tokenrl.errors import Refused
from tokenrl.settings import shown

CELLS = 2**21
"""Entries of the tables of states that are computed at once: 8 MiB."""


@dataclass(frozen=True)
class Automaton:
    """Says which tokens may follow: a completion begins in state 0, and each token leads to the next state.

    Attributes:
        edges: for each state what may follow: a text that is one token of the tokenizer, or the token's id, and
            the next state.
        accepting: the states in which the completion may end.

    Example:
        >>> Automaton([{"a": 0, "b": 1}, {}], accepting=[1])  # a*b
    """

    edges: Sequence[Mapping[Any, int]]
    accepting: Collection[int]


def automaton_of(rule: str | Sequence[str], tokenizer: Any, eos_ids: tuple[int, ...]) -> Automaton:
    """Return the automaton of a rule over tuples of token ids; no token stands in two tuples of a state.

    What counts is the text of a completion as rewards get it.

    Args:
        rule: a list of choices; or a text: of an automaton or a JSON schema if it begins with `{`, see
            `text_of_rule`, or else a regular expression of the whole completion.
        tokenizer: the tokenizer.
        eos_ids: the ids that end a completion.

    Raises:
        Refused: the rule cannot be read, or the tokenizer cannot write what it says.
    """
    if not isinstance(rule, str):
        return _tree(rule, _Writer(tokenizer, eos_ids))
    if rule.startswith('{"edges"'):
        saved = json.loads(rule)
        return _checked(
            [*map(dict, saved["edges"])], saved["accepting"], _Writer(tokenizer, eos_ids)
        )
    return _of_text(rule, tokenizer, eos_ids)


class _Writer:
    """Writes texts with the tokens that a completion may hold."""

    def __init__(self, tokenizer: Any, eos_ids: Iterable[int]) -> None:
        from tokenrl.language.policy.stops import special_tokens

        self.tokenizer = tokenizer
        self.special = {*special_tokens(tokenizer), *tokenizer.all_special_ids, *eos_ids}
        self.ids = {*tokenizer.get_vocab().values()} - self.special
        # Some tokenizers put a space in front of a text that stands alone, so others are encoded behind this.
        words = ([i] for i in sorted(self.ids) if self.read([i]).isalnum())
        self.before = next(words, [])

    def read(self, ids: Sequence[int]) -> str:
        """Return the text of a completion."""
        from tokenrl.language.policy.stops import decoded

        return decoded(self.tokenizer, [ids])[0]

    def write(self, text: str, before: list[int], most: int | None = None) -> list[int]:
        """Return the ids of a text, as demonstrations have them, or else as it stands alone.

        Args:
            text: the text.
            before: ids of what the text stands behind; none for the beginning of a completion.
            most: the most ids that there may be; None for any number.

        Raises:
            Refused: no ids write the text, or one of them is a special token, which completions leave out.
        """
        from tokenrl.language.policy.prompts import following_ids

        alone = self.tokenizer(text, add_special_tokens=False).input_ids
        behind = following_ids(SimpleNamespace(tokenizer=self.tokenizer), self.before, text)
        whole = self.read(before) + text
        for ids in (alone if behind is None else behind, alone):
            is_short = len(ids) <= (most or len(ids))
            if is_short and self.ids.issuperset(ids) and self.read([*before, *ids]) == whole:
                return list(ids)
        names = self.tokenizer.convert_ids_to_tokens(alone)
        raise Refused(
            f"the tokenizer cannot write {shown(text)}{' as one token' if most else ''}: its tokens are "
            f"{shown(names)}, without special ones. Give each token of an automaton an edge of its own."
        )


def _tree(texts: Sequence[str], writer: _Writer) -> Automaton:
    """Return the automaton of some texts, a tree of their tokens."""
    edges: list[dict[Any, int]] = [{}]
    accepting = set()
    for text in texts:
        state = 0
        for token in writer.write(text, []):
            state = edges[state].setdefault((token,), len(edges))
            if state == len(edges):
                edges.append({})
        accepting.add(state)
    return Automaton(edges, accepting)


def _checked(
    edges: Sequence[Mapping[Any, int]], accepting: Sequence[int], writer: _Writer
) -> Automaton:
    """Return a user's automaton over tuples of one id.

    Raises:
        Refused: a token or a state of it is none, or a state has no way to an end.
    """

    @lru_cache(None)
    def id_of(token: str | int) -> int:
        if isinstance(token, str):
            return writer.write(token, writer.before, most=1)[0]
        if token in writer.ids:
            return token
        raise Refused(f"the automaton has the token {token}, which is no id of the tokenizer's.")

    ending = {*accepting}
    states = range(len(edges))
    for _ in states:  # until no more states have a way to an end
        ending |= {state for state in states if not ending.isdisjoint(edges[state].values())}
    targets = {target for of_state in edges for target in of_state.values()}
    wrong = sorted({*accepting, *targets} - {*states}) or sorted({*states} - ending)
    if wrong or not edges:
        raise Refused(
            f"the automaton has {len(edges)} states, and {shown(wrong)} are none of them or have no way to an "
            "accepting one: correct its edges, or leave these states out."
        )
    return Automaton(
        [{(id_of(token),): target for token, target in of_state.items()} for of_state in edges],
        accepting,
    )


@lru_cache(maxsize=64)
def _of_text(rule: str, tokenizer: Any, eos_ids: tuple[int, ...]) -> Automaton:
    """Return the automaton of a regular expression, or of the text of a JSON schema.

    State 0 is that before the first token, which may write less than the same token later.
    """
    import numpy as np

    from tokenrl.language.policy.patterns import byte_automaton
    from tokenrl.language.policy.token_bytes import token_bytes

    table, accepting = byte_automaton(rule)
    states = np.arange(len(table), dtype=table.dtype)
    table = np.column_stack([table, states])
    written = token_bytes(tokenizer)
    ids = sorted(written.keys() - {*eos_ids}, key=lambda i: len(written[i][1]))
    symbols: dict[bytes, list[int]] = {}  # ids by the states after a token, from each state
    chunk = max(1, CELLS // len(table))
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        firsts, later = zip(*(written[i] for i in part), strict=True)
        columns = _walk(table, states, later)  # [n, S]
        columns[:, 0] = _walk(table, states[1:2], firsts)[:, 0]
        for row in np.flatnonzero(columns.any(1)):
            symbols.setdefault(columns[row].tobytes(), []).append(part[row])
    edges: list[dict[Any, int]] = [{} for _ in table]
    for column, of_symbol in symbols.items():
        targets = np.frombuffer(column, table.dtype)
        tokens = tuple(of_symbol)
        for state in np.flatnonzero(targets):
            edges[state][tokens] = int(targets[state])
    return Automaton(edges, np.flatnonzero(accepting).tolist())


def _walk(table: Any, states: Any, texts: Sequence[bytes]) -> Any:
    """Return the state after each of n texts from each of S states [n, S]; table [S, 257] stays at the byte 256."""
    import numpy as np

    width = max(map(len, texts))
    after = np.tile(states, (len(texts), 1))
    for steps in np.array([[*text] + [256] * (width - len(text)) for text in texts]).T:
        after = table[after, steps[:, None]]
    return after
