"""Makes automata over token ids from rules about completions, such as choices. Imports no torch at once."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Refused, read_file, refusing
from tokenrl.settings import shown

NEVER = 2**40
"""In `Part.needed`: no number of tokens leads to an end."""
BEFORE = "="
"""Text behind which texts are encoded, as some tokenizers put a space in front of one that stands alone."""

CELLS = 2**21
"""Most states of a table that is walked at once: 8 MB."""


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

    edges: Sequence[Mapping[str | int, int]]
    accepting: Collection[int]


class Part(NamedTuple):
    """An automaton over token ids in which tokens that act alike are one symbol.

    Attributes:
        tokens: ids that may be written in some state, sorted, without EOS [K].
        symbols: the symbol of each; those of one symbol lead to the same state from every state [K].
        sources, labels, targets: state, symbol and next state of each edge [E].
        accepting: the states in which a completion may end [S].
        needed: the least number of tokens to the end, EOS included; `NEVER` where there is no end [S].
    """

    tokens: np.ndarray
    symbols: np.ndarray
    sources: np.ndarray
    labels: np.ndarray
    targets: np.ndarray
    accepting: np.ndarray
    needed: np.ndarray


Rule = str | Mapping[str, Any] | Sequence[str] | Automaton
"""What completions may be: a regular expression, a JSON schema or its text, choices, or an automaton."""


def part_of_rule(rule: Rule, tokenizer: Any, eos_ids: Collection[int]) -> Part:
    """Return the automaton of a rule over the token ids of a tokenizer.

    What counts is the text of a completion as rewards get it. A regular expression holds for all of it.

    Args:
        rule: the rule; a text that begins with `{` is a JSON schema, another one is a regular expression.
        tokenizer: the tokenizer.
        eos_ids: the ids that end a completion.

    Raises:
        Refused: the rule is none, no completion fits it, or the tokenizer cannot write what it says.
    """
    if isinstance(rule, Mapping):
        with refusing(f"The schema {shown(rule)} is no JSON", "Give what json.dumps can write."):
            rule = json.dumps(rule)
    if isinstance(rule, str):
        return _part_of_text(rule, tokenizer, tuple(sorted(eos_ids)))
    writer = _Writer(tokenizer, eos_ids)
    if isinstance(rule, Automaton):
        return _part_of_automaton(rule, writer)
    if isinstance(rule, Sequence) and all(isinstance(text, str) for text in rule):
        return _part_of_choices(rule, writer)
    raise Refused(
        f"The rule {shown(rule)} for completions is a {type(rule).__name__}: give a regular expression, a JSON "
        "schema, a list of texts, or an Automaton."
    )


def read_rule(text: str) -> str:
    """Return a regular expression as it is, and of the name of a JSON file the schema in it, as compact JSON.

    Raises:
        Refused: the file cannot be read, or holds no JSON object.
    """
    if not text.endswith(".json"):
        return text
    with refusing(f"{text!r} holds no JSON schema", "Give a file with a JSON object."):
        schema = json.loads(read_file(Path(text)))
        if not isinstance(schema, dict):
            raise TypeError(f"it is a {type(schema).__name__}")
    return json.dumps(schema, separators=(",", ":"))


class _Writer:
    """Knows the tokens that a completion may hold, and writes texts with them."""

    def __init__(self, tokenizer: Any, eos_ids: Collection[int]) -> None:
        from tokenrl.language.policy.stops import special_tokens

        self.tokenizer = tokenizer
        self.special = {*special_tokens(tokenizer), *tokenizer.all_special_ids, *eos_ids}
        self.ids = {*tokenizer.get_vocab().values()} - self.special
        self.before = list(tokenizer(BEFORE, add_special_tokens=False).input_ids)

    def read(self, ids: Iterable[int]) -> str:
        """Return the text of a completion."""
        from tokenrl.language.policy.stops import decoded

        return decoded(self.tokenizer, [[*ids]])[0]

    def ways(self, text: str) -> list[list[int]]:
        """Return the ids of a text behind another, which are those of demonstrations, and alone.

        Raises:
            Refused: the text holds a special token.
        """
        from tokenrl.language.policy.prompts import following_ids

        alone = self.tokenizer(text, add_special_tokens=False).input_ids
        if names := [self.tokenizer.decode([i]) for i in alone if i in self.special]:
            raise Refused(
                f"The rule for completions has the text {text!r:.60}, in which {names[0]!r} is a special token, "
                "which completions leave out: leave it out."
            )
        behind = following_ids(SimpleNamespace(tokenizer=self.tokenizer), self.before, text)
        return [alone if behind is None else behind, alone]

    def token(self, key: Any) -> int:
        """Return the id of a token that is given as text or id.

        Raises:
            Refused: it is none, or it is a special one.
        """
        if not isinstance(key, str):
            if key in self.ids:
                return int(key)
            raise Refused(
                f"The automaton has the token {key!r}, which is no id of the tokenizer's or a special one: give "
                "the text of a token, or another id. States in which a completion may end are in accepting."
            )
        ways = self.ways(key)
        text = self.read(self.before) + key
        for ids in ways:
            if len(ids) == 1 and self.read([*self.before, *ids]) == text:
                return ids[0]
        parts = [self.read([i]) for i in ways[0]]
        raise Refused(
            f"The tokenizer cannot write {key!r} of the automaton as one token: it has {parts!r:.80}. Give each "
            "of these an edge of its own, through further states."
        )


def _part_of_choices(texts: Sequence[str], writer: _Writer) -> Part:
    """Return the automaton of a list of texts, a tree of their tokens."""
    if not texts:
        raise Refused("The list of choices is empty: give at least one text.")
    edges: list[dict[int, int]] = [{}]
    accepting = set()
    for text in dict.fromkeys(texts):
        ids = next((ids for ids in writer.ways(text) if writer.read(ids) == text), None)
        if ids is None:
            raise Refused(
                f"The tokenizer cannot write the choice {text!r:.60}: it reads "
                f"{writer.read(writer.ways(text)[0])!r:.60}. Give texts that the tokenizer can write."
            )
        state = 0
        for i in ids:
            following = edges[state].setdefault(i, len(edges))
            if following == len(edges):
                edges.append({})
            state = following
        accepting.add(state)
    return _part_of_edges(edges, accepting)


def _part_of_automaton(rule: Automaton, writer: _Writer) -> Part:
    """Return a user's automaton over ids.

    Raises:
        Refused: a token or state of it is none, or a state can be reached from which no end can.
    """
    states = range(len(rule.edges))
    token = lru_cache(None)(writer.token)
    edges: list[dict[int, int]] = []
    for state, row in enumerate(rule.edges):
        edges.append({})
        for key, target in row.items():
            if target not in states:
                raise Refused(
                    f"The automaton leads from state {state} with {key!r} to {target!r}, which is no state: it "
                    f"has the states 0 to {len(states) - 1}, an entry of edges for each."
                )
            if edges[-1].setdefault(token(key), target) != target:
                raise Refused(
                    f"The automaton leads from state {state} with the token {key!r} to two states: leave one out."
                )
    if not rule.accepting or not all(state in states for state in rule.accepting):
        raise Refused(
            f"The automaton has the accepting states {shown(rule.accepting)}: give at least one, of "
            f"0 to {len(states) - 1}."
        )
    part = _part_of_edges(edges, rule.accepting)
    reached = _distances(part.targets, part.sources, np.arange(len(states)) == 0)
    ends = np.flatnonzero((reached < NEVER) & (part.needed == NEVER))
    if len(ends):
        raise Refused(
            f"The automaton can come to state {ends[0]}, from which no accepting state can be reached: leave out "
            "what leads there, or add an edge."
        )
    return part


def _part_of_edges(edges: Sequence[Mapping[int, int]], accepting: Collection[int]) -> Part:
    """Return an automaton from the next state by id for each state."""
    columns: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for state, row in enumerate(edges):
        for token, target in row.items():
            columns[token].append((state, target))
    symbols: dict[Any, int] = {}
    of_tokens = [symbols.setdefault(tuple(column), len(symbols)) for column in columns.values()]
    rows = [(state, s, target) for column, s in symbols.items() for state, target in column]
    accepts = np.isin(np.arange(len(edges)), [*accepting])
    return _part([*columns], of_tokens, np.array(rows).reshape(-1, 3).T, accepts)


def _part(tokens: Any, symbols: Any, edges: Any, accepting: np.ndarray) -> Part:
    """Return an automaton with the number of tokens that are needed from each state.

    Args:
        tokens: ids [K].
        symbols: their symbols [K].
        edges: state, symbol and next state [3, E].
        accepting: the states in which a completion may end [S].

    Raises:
        Refused: no completion fits.
    """
    sources, labels, targets = np.asarray(edges, dtype=np.int64)
    needed = _distances(sources, targets, accepting)
    if needed[0] == NEVER:
        raise Refused(
            "No completion fits the rule: no sequence of the tokenizer's tokens leads to an end."
        )
    order = np.argsort(tokens)
    ids, of_ids = np.array([tokens, symbols], dtype=np.int64)[:, order]
    return Part(ids, of_ids, sources, labels, targets, accepting, needed)


def _distances(sources: np.ndarray, targets: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return for each state the least number of edges to one of the ends, plus 1 [S]."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    size = len(ends)
    graph = csr_array((np.ones(len(sources)), (targets, sources)), (size, size))
    distances = dijkstra(graph, indices=np.flatnonzero(ends), unweighted=True, min_only=True)
    return np.where(np.isinf(distances), NEVER, distances + 1).astype(np.int64)


@lru_cache(maxsize=64)
def _part_of_text(rule: str, tokenizer: Any, eos_ids: tuple[int, ...]) -> Part:
    """Return the automaton of a regular expression, or of the text of a JSON schema.

    State 0 is that before the first token, which may write less than the same token later.

    Raises:
        Refused: no completion fits, the tokenizer does not fit, or the rule cannot be read.
    """
    from tokenrl.language.policy.patterns import byte_automaton
    from tokenrl.language.policy.token_bytes import token_bytes

    table, accepting = byte_automaton(rule)
    written = token_bytes(tokenizer)
    ids = sorted(written.keys() - {*eos_ids}, key=lambda i: len(written[i][1]))
    tokens, of_tokens = [], []
    symbols: dict[bytes, int] = {}
    chunk = max(1, CELLS // len(table))
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk]
        firsts, later = zip(*(written[i] for i in part), strict=True)
        columns = _walk(table, np.arange(len(table)), later)  # [n, S]
        columns[:, 0] = _walk(table, np.array([1]), firsts)[:, 0]
        for row in np.flatnonzero(columns.any(1)):
            tokens.append(part[row])
            of_tokens.append(symbols.setdefault(columns[row].tobytes(), len(symbols)))
    moves = np.frombuffer(b"".join(symbols), table.dtype).reshape(-1, len(table))
    labels, sources = moves.nonzero()
    return _part(tokens, of_tokens, [sources, labels, moves[labels, sources]], accepting)


def _walk(table: np.ndarray, states: np.ndarray, texts: Sequence[bytes]) -> np.ndarray:
    """Return the state after each of n texts from each of S states [n, S]."""
    after = np.tile(states.astype(table.dtype), (len(texts), 1))
    lengths = np.array([len(text) for text in texts])
    for k in range(lengths.max()):
        longer = np.flatnonzero(lengths > k)
        step = np.array([texts[row][k] for row in longer.tolist()])
        after[longer] = table[after[longer], step[:, None]]
    return after
