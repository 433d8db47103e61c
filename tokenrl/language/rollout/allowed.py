"""Says which tokens a completion may go on with, in sampling and in scoring alike.

A rule for completions is an automaton over token ids. All automata that the rows of some data need stand in one
table: states are numbered through, and tokens that act alike in each of them form a class, so that the table is
small also where the vocabulary is large. A token is allowed where it has an edge to a state from which the completion
can end within the tokens that are left. So no completion is ever cut: each that is sampled fulfils its rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from tokenrl.errors import Refused, with_places
from tokenrl.files import canonical
from tokenrl.language.policy.automata import Automaton, automaton_of
from tokenrl.language.policy.stops import decoded
from tokenrl.language.rollout.distribution import COLUMN, file_of_rule, text_of_rule
from tokenrl.names import import_attribute
from tokenrl.settings import shown
from tokenrl.user_code import copied, guarded

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.rollout.sampling import Sampling

Row = Mapping[str, Any]
S = TypeVar("S", bound="Sampling")
ROWS = 32
"""Rows of logits that are restricted at once: memory of this size is used again, and more of it would be new."""
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
        needed: the least number of tokens from each state to the end, EOS included, or infinity [S].
        numbers: 0 to the most edges of a state.
        count: the number C.
        starts: the first state of each row, by the row as text; empty if all rows begin in state 0.
        begins: the key of the first position of each of the B prompts that are sampled now; None before.
    """

    classes: Tensor
    first: Tensor
    labels: Tensor
    targets: Tensor
    needed: Tensor
    numbers: Tensor
    count: int
    starts: Mapping[str, int]
    begins: Tensor | None = None

    def states_of(self, data: Sequence[Row]) -> Tensor:
        """Return the first state of each of B rows of the data [B]."""
        states = [self.starts[canonical(dict(row))] if self.starts else 0 for row in data]
        return torch.tensor(states, device=self.classes.device)

    def beginning(self, data: Sequence[Row], length: int) -> AllowedTokens:
        """Return the table for completions of B rows, of at most `length` tokens each."""
        return replace(self, begins=self.states_of(data) * STRIDE + length)

    def restricted(self, logits: Tensor, keys: Tensor) -> Tensor:
        """Return the logits of n positions [n, V], given by their keys [n], with -inf where a token is not allowed.

        Without a gradient they are written over.
        """
        label, _, fits = self._edges(keys)
        of_classes = self.needed.new_full((len(keys), self.count + 1), -math.inf)
        label = torch.where(fits, label, self.count)
        of_classes.scatter_(1, label, torch.where(fits, 0.0, -math.inf))
        if logits.requires_grad:
            return logits + of_classes.index_select(1, self.classes)
        for rows, penalties in zip(logits.split(ROWS), of_classes.split(ROWS), strict=True):
            rows += penalties.index_select(1, self.classes)
        return logits

    def following(self, keys: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys of the positions after n tokens, and whether each token is allowed; both [n].

        Args:
            keys: the keys of the positions of the tokens [n].
            ids: the tokens [n].
        """
        label, target, fits = self._edges(keys)
        is_taken = fits & (label == self.classes[ids][:, None])
        state = (target * is_taken).sum(dim=1)
        return state * STRIDE + keys % STRIDE - 1, is_taken.any(dim=1)

    def _edges(self, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the edges of n positions, given by their keys [n].

        Returns:
            The class of tokens of each edge, the state to which it leads, and whether it is allowed, as the
            completion can end from there within the tokens that are left; each [n, most edges of a state].
        """
        state = keys // STRIDE
        begin = self.first[state][:, None]
        number = begin + self.numbers
        is_edge = number < self.first[state + 1][:, None]
        number = torch.where(is_edge, number, begin)
        target = self.targets[number]
        fits = is_edge & (self.needed[target] < (keys % STRIDE)[:, None])
        return self.labels[number], target, fits


def with_allowed(policy: Policy, rows: Iterable[Row], sampling: S) -> S:
    """Return how completions are sampled, with the automata of all rows in place of the rule that makes them.

    Without a rule, and where the automata are there already, nothing changes.

    Args:
        policy: writes the completions.
        rows: all rows of the data that will be sampled.
        sampling: how they are sampled.

    Raises:
        Refused: a rule cannot be read, nothing fulfils it, or it needs more tokens than a completion may have.
    """
    rule: Any = sampling.allowed
    if not rule or isinstance(rule, AllowedTokens):
        return sampling
    if policy.stops is not None:
        raise Refused("allowed says where a completion ends, and so does stop: give one of them.")
    rule_of = _rule_of(rule)
    automata: dict[str, Automaton] = {}
    locations: dict[str, str] = {}
    of_rows: dict[str, str] = {}
    for location, row in with_places(rows):
        own = rule if rule_of is None else rule_of(row, location)
        text = canonical(own)
        if text not in automata:
            automata[text] = _read(own, policy, location)
            locations[text] = location
        if rule_of is None:
            break
        of_rows[canonical(dict(row))] = text
    table, begins = joined(policy, [*automata.values()])
    limit = sampling.max_completion_length
    for begin, location in zip(begins, locations.values(), strict=True):
        needed = float(table.needed[begin])
        if needed > limit:
            remedy = f"the shortest has {needed:g}, EOS included: raise max_completion_length"
            if math.isinf(needed):
                remedy = "the tokenizer cannot write what it asks for: change the rule or the model"
            raise Refused(
                f"allowed, for {location}: it allows no completion of {limit} tokens; {remedy}."
            )
    states = dict(zip(automata, begins, strict=True))
    read: Any = replace(table, starts={row: states[text] for row, text in of_rows.items()})
    return replace(sampling, allowed=read)


def _read(rule: Any, policy: Policy, location: str) -> Automaton:
    """Return the automaton of a row's rule over tuples of ids; a refusal names the row."""
    try:
        return automaton_of(rule, policy.tokenizer, policy.eos_ids)
    except Refused as error:
        raise Refused(f"allowed, for {location}: {error}") from error


def check_allowed(policy: Policy, sampling: Sampling, row: Row, ids: Sequence[int]) -> None:
    """Refuse a completion of a row that its rule does not allow.

    Args:
        policy: decodes the completion.
        sampling: holds the rule, which was read for this row.
        row: the row of the data.
        ids: the completion, EOS included.
    """
    rules: Any = sampling.allowed
    keys = rules.beginning([row], len(ids)).begins
    for position, token in enumerate(ids):
        keys, is_allowed = rules.following(keys, torch.full_like(keys, token))
        if not is_allowed:
            before, after = decoded(policy.tokenizer, [ids[:position], ids[position:]])
            raise Refused(
                f"allowed refuses this completion: after {shown(before)} it goes on with {shown(after)}. "
                "Correct the completion or the rule."
            )


def _rule_of(rule: Any) -> Callable[[Row, str], Any] | None:
    """Return what makes the rule of each row of the data; None if all rows have the same."""
    if callable(rule):
        return partial(_asked, rule)
    if rule.endswith(".json"):
        raise Refused(
            f"allowed: there is no file {rule}; a regular expression that ends so is written with [.]json."
        )
    if rule.startswith(COLUMN):
        return partial(_choices, rule.removeprefix(COLUMN))
    return partial(_asked, import_attribute(rule, "allowed")) if file_of_rule(rule) else None


def _choices(column: str, row: Row, location: str) -> list[str]:
    """Return the choices of a row of the data."""
    choices = row.get(column)
    if not isinstance(choices, list | tuple) or not choices:
        raise Refused(
            f"allowed takes the choices of a row from its column {column!r}, which holds {shown(choices)} in "
            f"{location}: give a list of one text or more."
        )
    return [*map(str, choices)]


def _asked(function: Callable[[Any], Any], row: Row, location: str) -> Any:
    """Return the rule that a function of the user's makes of a row, as text or as a list of choices.

    Raises:
        Refused: it fails, or returns another rule when it is asked again.
    """
    rules = []
    for _ in range(2):
        with guarded(f"The function of allowed failed for {location}", Refused):
            rule = function(copied(dict(row)))
        rules.append([*rule] if isinstance(rule, list | tuple) else text_of_rule(rule))
    if rules[0] != rules[1]:
        raise Refused(
            f"The function of allowed returned {shown(rules[0], 80)} for {location}, and {shown(rules[1], 80)} when "
            "it was asked again: a rule has to follow from the row alone."
        )
    return rules[0]


def joined(policy: Policy, automata: Sequence[Automaton]) -> tuple[AllowedTokens, list[int]]:
    """Put automata into one table on the device of a policy, and return it with the first state of each.

    Args:
        policy: writes the completions.
        automata: automata whose edges have tuples of ids in place of tokens.
    """
    begins = [*accumulate((len(automaton.edges) for automaton in automata), initial=0)]
    end = begins.pop()
    symbols: dict[Any, int] = {policy.eos_ids: 0}
    edges = [(end, 0, end)]
    for begin, automaton in zip(begins, automata, strict=True):
        edges += [(begin + state, 0, end) for state in automaton.accepting]
        for state, following in enumerate(automaton.edges, begin):
            for ids, target in following.items():
                edges.append((state, symbols.setdefault(ids, len(symbols)), begin + target))
    of_tokens: dict[int, list[int]] = {}
    for ids, number in symbols.items():
        for token in ids:
            of_tokens.setdefault(token, []).append(number)
    numbers: dict[tuple[int, ...], int] = {}
    classes = {
        token: numbers.setdefault((*of_token,), len(numbers))
        for token, of_token in of_tokens.items()
    }
    members: list[list[int]] = [[] for _ in symbols]
    for of_class, number in numbers.items():
        for symbol in of_class:
            members[symbol].append(number)
    rows = sorted(
        (state, number, target) for state, symbol, target in edges for number in members[symbol]
    )
    sources, labels, targets = torch.tensor(rows).T.contiguous()
    vocabulary: int = policy.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    first = torch.searchsorted(sources, torch.arange(end + 2))
    backwards = csr_array((torch.ones(len(rows)), (targets, sources)), (end + 1, end + 1))
    columns = {
        "classes": torch.tensor([classes.get(token, len(numbers)) for token in range(vocabulary)]),
        "first": first,
        "labels": labels,
        "targets": targets,
        "needed": torch.tensor(dijkstra(backwards, indices=end, unweighted=True)).float(),
        "numbers": torch.arange(int(first.diff().max())),
    }
    on_device: Any = {name: x.to(policy.device) for name, x in columns.items()}
    return AllowedTokens(**on_device, count=len(numbers), starts={}), begins
