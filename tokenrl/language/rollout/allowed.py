"""Says which tokens a completion may go on with, in sampling and in scoring alike.

A rule for completions is an automaton over token ids. All automata that the rows of some data need stand in one
table: states are numbered through, and tokens that act alike in each of them form a class, so that the table is
small also where the vocabulary is large. A token is allowed where it has an edge to a state from which the completion
can end within the tokens that are left. So no completion is ever cut: each that is sampled fulfils its rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tokenrl.errors import Refused, locations_of
from tokenrl.files import canonical
from tokenrl.language.policy.automata import Automaton, Part, part_of_rule
from tokenrl.language.rollout.distribution import COLUMN, file_of_rule, text_of_rule
from tokenrl.language.rollout.rollout import to_device, zeroed
from tokenrl.names import import_attribute
from tokenrl.settings import shown
from tokenrl.user_code import copied, guarded

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.rollout.sampling import Sampling

Row = Mapping[str, Any]
S = TypeVar("S", bound="Sampling")
STRIDE = 2**32
"""The key of a position is its state times this, plus the number of tokens that are left from it on."""


@dataclass(frozen=True, eq=False)
class AllowedTokens:
    """The automata of all rows of some data, with S states, E edges and C classes of tokens.

    The last state is the end: EOS leads to it, and from it to itself, as rows that have ended may be sampled on.

    Attributes:
        classes: the class of each token of the model's vocabulary [V]; C for a token that is never allowed.
        first: the number of each state's first edge [S + 1]; its edges are consecutive.
        labels: the class of tokens of each edge [E].
        targets: the state to which each edge leads [E].
        needed: the least number of tokens from each state to the end, EOS included [S].
        count: the number C.
        width: the most edges of a state.
        starts: the first state of each row, by the row as text; empty if all rows begin in state 0.
        begins: the key of the first position of each of the B prompts that are sampled now; None before.
        copies: the same table on other devices.
    """

    classes: Tensor
    first: Tensor
    labels: Tensor
    targets: Tensor
    needed: Tensor
    count: int
    width: int
    starts: Mapping[str, int] = field(default_factory=dict)
    begins: Tensor | None = None
    copies: dict[str, AllowedTokens] = field(default_factory=dict)

    def on(self, device: torch.device) -> AllowedTokens:
        """Return the table on a device, to which it is copied once."""
        if device == self.classes.device:
            return self
        if str(device) not in self.copies:
            moved: dict[str, Any] = {
                name: to_device(x, device) for name, x in vars(self).items() if isinstance(x, Tensor)
            }
            self.copies[str(device)] = replace(self, **moved, copies={})
        return self.copies[str(device)]

    def needed_by(self, data: Sequence[Row]) -> Tensor:
        """Return the least number of tokens of a completion of each of B rows, EOS included [B]."""
        return self.needed[self._states_of(data)]

    def beginning(self, data: Sequence[Row], length: int) -> AllowedTokens:
        """Return the table for completions of B rows, of at most `length` tokens each."""
        return replace(self, begins=self._states_of(data) * STRIDE + length)

    def _states_of(self, data: Sequence[Row]) -> Tensor:
        if not self.starts:
            return torch.zeros(len(data), dtype=torch.int64)
        return torch.tensor([self.starts[canonical(dict(row))] for row in data])

    def mask(self, keys: Tensor) -> Tensor:
        """Return which tokens are allowed at n positions, given by their keys [n]: booleans [n, V]."""
        table = self.on(keys.device)
        label, _, fits = table._edges(keys)
        label = label.masked_fill(~fits, self.count)
        allowed = fits.new_zeros(len(keys), self.count + 1).scatter_(1, label, fits)
        allowed[:, self.count] = False
        return allowed.index_select(1, table.classes)

    def following(self, keys: Tensor, ids: Tensor) -> Tensor:
        """Return the keys of the positions after n tokens that are allowed at n positions [n]."""
        return self._taken(keys, ids)[0]

    def walk(self, ids: Tensor, mask: Tensor, begins: Tensor) -> tuple[Tensor, Tensor]:
        """Return the key of each position of completions that something else has written.

        Args:
            ids: ids of N completions [N, T].
            mask: True on their tokens [N, T].
            begins: the keys of their first positions [N].

        Returns:
            The keys, and where a token is not allowed; both [N, T].
        """
        keys = torch.zeros_like(ids)
        wrong = torch.zeros_like(mask)
        for t in range(ids.shape[1]):
            keys[:, t] = begins
            begins, is_allowed = self._taken(begins, ids[:, t])
            wrong[:, t] = mask[:, t] & ~is_allowed
        return zeroed(keys, mask), wrong

    def _taken(self, keys: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys after n tokens, and which of these are allowed; state 0 follows where one is not."""
        table = self.on(keys.device)
        label, target, fits = table._edges(keys)
        is_taken = fits & (label == table.classes[ids][:, None])
        state = (target * is_taken).sum(dim=1)
        return state * STRIDE + (keys % STRIDE - 1).clamp(min=0), is_taken.any(dim=1)

    def _edges(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the edges of n positions, given by their keys [n].

        Returns:
            The class of tokens of each edge, the state to which it leads, and whether it is allowed, as the
            completion can end from there within the tokens that are left; each [n, width].
        """
        state = keys // STRIDE
        begin = self.first[state][:, None]
        number = begin + torch.arange(self.width, device=keys.device)
        is_edge = number < self.first[state + 1][:, None]
        number = torch.where(is_edge, number, begin)
        target = self.targets[number]
        fits = is_edge & (self.needed[target] < (keys % STRIDE)[:, None])
        return self.labels[number], target, fits


def with_allowed(policy: Policy, rows: Sequence[Row], sampling: S) -> S:
    """Return how completions are sampled, with the automata of all rows in place of the rule that makes them.

    Without a rule, and where the automata are there already, nothing changes.

    Args:
        policy: writes the completions.
        rows: all rows of the data that will be sampled.
        sampling: how they are sampled.

    Raises:
        Refused: a rule cannot be read, nothing fulfils it, or it needs more tokens than a completion may have.
    """
    rule = sampling.allowed
    if not rule or isinstance(rule, AllowedTokens):
        return sampling
    if policy.stops is not None:
        raise Refused(
            "allowed says where a completion may end, and so do stop strings: give allowed without stop."
        )
    rule_of = _rule_of(rule)
    locations = locations_of(rows) or [f"row {number}" for number in range(len(rows))]
    parts: list[Part] = []
    numbers: dict[str, int] = {}
    of_rows: dict[str, int] = {}
    for row, location in zip(rows, locations, strict=True):
        own = rule if rule_of is None else rule_of(row, location)
        text = canonical(own)
        if text not in numbers:
            numbers[text] = len(parts)
            parts.append(_part(own, policy, sampling.max_completion_length, location))
        if rule_of is None:
            break
        of_rows[canonical(dict(row))] = numbers[text]
    vocabulary: int = policy.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    table, begins = merged(parts, vocabulary, policy.eos_ids)
    starts = {row: begins[number] for row, number in of_rows.items()}
    return replace(sampling, allowed=replace(table, starts=starts))


def _part(rule: Any, policy: Policy, length: int, location: str) -> Part:
    """Compile the rule of a row, whose location a refusal names."""
    if str(rule).startswith('{"edges"'):
        saved = json.loads(rule)
        rule = Automaton([dict(edges) for edges in saved["edges"]], saved["accepting"])
    try:
        part = part_of_rule(rule, policy.tokenizer, policy.eos_ids)
    except Refused as error:
        raise Refused(f"allowed, for {location}: {error}") from error
    needed = int(part.needed[0])
    if needed > length:
        raise Refused(
            f"allowed, for {location}: the shortest completion that it allows has {needed} tokens, EOS included, and "
            f"max_completion_length is {length}: raise it to {needed} or more."
        )
    return part


def _rule_of(rule: Any) -> Callable[[Row, str], Any] | None:
    """Return what makes the rule of each row of the data; None if all rows have the same."""
    column = str(rule).removeprefix(COLUMN)
    if column != str(rule):
        return partial(_choices, column)
    if isinstance(rule, str) and not file_of_rule(rule):
        return None
    function = import_attribute(rule, "allowed") if isinstance(rule, str) else rule
    name = rule if isinstance(rule, str) else getattr(rule, "__name__", type(rule).__name__)
    return partial(_asked, function, name)


def _choices(column: str, row: Row, location: str) -> list[str]:
    """Return the choices of a row of the data."""
    choices = row.get(column)
    if not isinstance(choices, list | tuple) or not choices:
        raise Refused(
            f"allowed takes the choices of each row from the column {column!r}, and in {location} it holds "
            f"{shown(choices)}: give a list of one text or more."
        )
    return [*map(str, choices)]


def _asked(function: Callable[[Any], Any], name: str, row: Row, location: str) -> Any:
    """Return the rule that a function of the user's makes of a row, as text or as a list of choices.

    Raises:
        Refused: it fails, or returns another rule when it is asked again.
    """
    rules = []
    for _ in range(2):
        with guarded(f"allowed: {name} failed for {location}", Refused):
            rule = function(copied(dict(row)))
        rules.append([*rule] if isinstance(rule, list | tuple) else text_of_rule(rule))
    if rules[0] != rules[1]:
        raise Refused(
            f"allowed: {name} returned {shown(rules[0], 80)} for {location}, and {shown(rules[1], 80)} when it was "
            "asked again: a rule has to follow from the row alone."
        )
    return rules[0]


def merged(
    parts: Sequence[Part], vocabulary: int, eos_ids: Sequence[int]
) -> tuple[AllowedTokens, list[int]]:
    """Put automata into one table, and return it with the first state of each.

    Args:
        parts: the automata.
        vocabulary: V, the tokens of the model.
        eos_ids: the tokens that end a completion.
    """
    classes = np.zeros(vocabulary, dtype=np.int64)
    for part in parts:  # tokens of a class act alike in all automata before
        pairs = classes[part.tokens] * (part.symbols.max(initial=0) + 1) + part.symbols
        classes[part.tokens] = classes.max() + 1 + np.unique(pairs, return_inverse=True)[1]
    classes[[*eos_ids]] = classes.max() + 1
    names, classes = np.unique(classes, return_inverse=True)
    count = len(names) - (names[0] == 0)
    classes = (classes - 1) % (count + 1) if names[0] == 0 else classes
    end = sum(len(part.accepting) for part in parts)
    begins: list[int] = []
    eos = classes[eos_ids[0]]
    edges = [(np.array([end]), np.array([eos]), np.array([end]))]
    for part in parts:
        begin = begins[-1] + len(parts[len(begins) - 1].accepting) if begins else 0
        begins.append(begin)
        ending = np.flatnonzero(part.accepting)
        edges.append((begin + ending, np.full_like(ending, eos), np.full_like(ending, end)))
        source, label, target = _by_class(part, classes)
        edges.append((begin + source, label, begin + target))
    sources, labels, targets = map(np.concatenate, zip(*edges, strict=True))
    order = np.argsort(sources, kind="stable")
    first = np.searchsorted(sources[order], np.arange(end + 2))
    needed = np.concatenate([*(part.needed for part in parts), [0]])
    table = AllowedTokens(
        classes=torch.from_numpy(classes),
        first=torch.from_numpy(first),
        labels=torch.from_numpy(labels[order]),
        targets=torch.from_numpy(targets[order]),
        needed=torch.from_numpy(needed),
        count=count,
        width=int(np.diff(first).max()),
    )
    return table, begins


def _by_class(part: Part, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return source, class of tokens and target of the edges of an automaton, each class by itself."""
    count = classes.max() + 1
    symbols, of_symbol = np.divmod(np.unique(part.symbols * count + classes[part.tokens]), count)
    begin = np.searchsorted(symbols, np.arange(part.symbols.max(initial=0) + 2))
    repeats = np.diff(begin)[part.labels]
    numbers = np.arange(repeats.sum()) - np.repeat(repeats.cumsum() - repeats, repeats)
    label = of_symbol[np.repeat(begin[part.labels], repeats) + numbers]
    return np.repeat(part.sources, repeats), label, np.repeat(part.targets, repeats)
