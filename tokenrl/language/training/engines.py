"""Starts the engine that samples a run, and holds it to what it was asked for.

An engine is a `Generator` of another package or of a user. A run learns from what it returns, so each rollout
is checked before anything reads it, and the first ones are compared with the trainer. The default generator
samples from the trainer's own model, and its rollouts are taken as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenrl.core.estimator import Estimator
from tokenrl.core.rows import completion_mask
from tokenrl.errors import (
    ENDS,
    USER_CODE_FAILED,
    Refused,
    Stopped,
    TokenrlError,
    explain,
    raised,
)
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.agreement import WrongRollout
from tokenrl.language.rollout.engine_checks import (
    COARSE,
    FARTHEST,
    FIRST,
    ROUNDING,
    Bets,
    check_greedy,
    check_samples,
)
from tokenrl.language.rollout.forward import shape_of
from tokenrl.language.rollout.generator import (
    Abilities,
    Generator,
    LaggedGenerator,
    TransformersGenerator,
)
from tokenrl.language.rollout.rollout import (
    COLUMNS,
    Rollout,
    pad_left,
    zeroed,
)
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Regime, Scores
from tokenrl.language.rollout.vllm import VllmGenerator
from tokenrl.names import NamedFunction
from tokenrl.settings import shown
from tokenrl.user_code import copied, user_code

MakeGenerator = Callable[[Policy, int | None], Generator]
"""Makes a generator of a policy and the most completions that are sampled at once (None: all)."""
UNUSABLE = (
    "generate returned a rollout that cannot be used (see tokenrl.language.Rollout for its columns)"
)
MOST_TOKENS = 4096
"""The most tokens whose probabilities are kept at each position: 1 MiB for a completion of 64 tokens."""
OF_TRAINER = (*Scores._fields, "sampling_distribution")
"""Columns that are the trainer's own, whatever an engine says of them."""
ENGINES: dict[str, Any] = {"transformers": TransformersGenerator, "vllm": VllmGenerator}


class Engine(NamedTuple):
    """The engine of a run, before it is made.

    Attributes:
        name: the engine, or the user's function that makes it, as messages call it.
        make: makes the generator.
        abilities: what its class, or that function, says that it can do.
        lags: whether it can sample from weights of earlier steps.
        is_default: whether it samples from the trainer's own model.
    """

    name: str
    make: MakeGenerator
    abilities: Abilities
    lags: bool
    is_default: bool


def engine_of(named: Any, cache: float) -> Engine:
    """Return the engine of a run.

    Args:
        named: its name, or a user's function that makes it.
        cache: GiB for keys and values, if it is one of this package.

    Raises:
        Refused: it cannot be imported, or has other abilities than `Abilities`.
    """
    name = str(getattr(named, "__name__", named))
    engine = named
    if isinstance(named, NamedFunction):
        engine = named.load()
    elif isinstance(named, str):
        engine = ENGINES[named]
    make = engine.start if engine is VllmGenerator else engine
    if engine in ENGINES.values():
        make = partial(make, cache=cache)
    announces = getattr(engine, "announce", Generator.announce) is not Generator.announce
    is_default = engine is TransformersGenerator
    return Engine(name, make, _abilities_of(engine), announces or is_default, is_default)


def _abilities_of(engine: Any) -> Abilities:
    """Return what an engine, its class or a function that makes it says that it can do, if it is `Abilities`."""
    abilities = getattr(engine, "abilities", Generator.abilities)
    if isinstance(abilities, Abilities):
        return abilities
    raise Refused(f"An engine has abilities {shown(abilities)}; give tokenrl.language.Abilities.")


def check_vocabulary(estimator: Estimator, policy: Policy) -> None:
    """Refuse centred scores of a vocabulary that is too large to keep the probabilities of all tokens.

    Raises:
        Refused: it is too large.
    """
    size: int = shape_of(policy).vocab_size
    if estimator.importance_centre and size > MOST_TOKENS:
        raise Refused(
            f"importance_centre keeps the sampler's probabilities of {size:,} tokens at each position, which "
            f"is possible up to {MOST_TOKENS:,} tokens. Set importance_centre to False; importance 'token' "
            "or 'sequence' needs the probabilities of the sampled tokens only."
        )


def start_engine(
    make: MakeGenerator, policy: Policy, regime: Regime, rows_at_once: int | None, every: int = 1
) -> Generator:
    """Start a generator; unless it is the default one, or an older copy, all that it returns is checked.

    Args:
        make: makes the generator from the policy and `rows_at_once`.
        policy: the policy that is sampled.
        regime: how the policy is sampled and scored.
        rows_at_once: the most completions that are sampled at once; None for all.
        every: with more than 1, the default generator samples training from an older copy, see `LaggedGenerator`.

    Raises:
        Refused: the generator cannot be made, or lacks a method.
    """
    with _told("The generator could not be made", Refused):
        engine = make(policy, rows_at_once)
        abilities = _abilities_of(engine)
    if type(engine) is not TransformersGenerator or engine.policy is not policy:
        return CheckedEngine(engine, policy, regime, abilities)
    engine = replace(engine, regime=regime)
    return LaggedGenerator(engine, every) if every > 1 else engine


@contextmanager
def _told(failure: str, kind: type[TokenrlError]) -> Iterator[None]:
    """Raise what goes wrong with an engine in the block as this kind of error, in words."""
    try:
        with user_code():
            yield
    except TokenrlError:
        raise
    except USER_CODE_FAILED as error:
        fault = str(error) if isinstance(error, WrongRollout) else raised(error)
        lost = None if isinstance(error, ENDS) else explain(error)
        raise lost or kind(f"{failure}: {fault}.") from error


@dataclass
class CheckedEngine(Generator):
    """An engine whose rollouts are checked, and each call of which gives settings back and fails in words.

    Attributes:
        engine: samples the completions.
        policy: the policy that is sampled, with the weights of the trainer.
        regime: how the policy is scored.
        abilities: what the engine can do. Once it samples ahead of updates, it need not agree with the trainer.
        greedy_compared: whether greedy completions of the present weights were compared with the trainer.
        samples_compared: whether sampled completions were compared with the trainer.
        bets: bets on all of its completions that it samples from other probabilities than it reports.
        remark: in words, how far later ones differed from the trainer's; empty if little.
    """

    engine: Generator
    policy: Policy
    regime: Regime
    abilities: Abilities  # type: ignore[misc]
    greedy_compared: bool = False
    samples_compared: bool = False
    bets: Bets = field(default_factory=Bets)
    remark: str = ""

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions as `Generator.generate` says.

        Raises:
            Stopped: the engine failed, or returned something else than it was asked for.
        """
        with self._told("generate failed"):  # an engine may change what it is given
            answer = self.engine.generate([*map(list, prompt_ids)], sampling, draws)
        with self._told(UNUSABLE):
            rollout = checked(answer, prompt_ids, sampling, self.policy)
            if draws is None and not self.greedy_compared:
                check_greedy(rollout, self.policy, self.regime)
                self.greedy_compared = True
        return rollout

    def check(self, rows: Rollout, sampling: Sampling) -> None:
        """Compare sampled completions with the trainer, whose log-probabilities they have by now.

        Raises:
            Stopped: the engine's numbers are of another policy or another distribution, though it has the
                weights of the start, or says that it agrees. Otherwise a `remark` tells of them.
        """
        model: Any = self.policy.model
        agrees = self.abilities.agrees
        limit = COARSE if self.samples_compared else FARTHEST
        if agrees:
            limit = FIRST if sampling.is_whole and not self.samples_compared else ROUNDING
            if model.dtype.itemsize < 4:
                limit = COARSE
        try:
            with self._told(UNUSABLE):
                check_samples(rows, sampling, limit)
        except Stopped as error:  # its weights may be older now
            if agrees or not self.samples_compared:
                raise
            self.remark = str(error)
        self.samples_compared = True
        self.bets.place(rows)

    def settle(self) -> dict[str, float]:
        """Settle the bets of a step as `Bets.settle` does; every process has to call this.

        Raises:
            Stopped: a bet is won.
        """
        with self._told(UNUSABLE):
            return self.bets.settle()

    def state_dict(self) -> dict[str, Any]:
        """Return what a continuation must know of the bets."""
        return {"capital": self.bets.capital}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, or from nothing if another engine sampled before."""
        self.bets.capital += state.get("capital", 0.0)

    def _told(self, failure: str) -> AbstractContextManager[None]:
        """Return a context that raises `Stopped`, which names the engine, for what fails in it."""
        return _told(f"{type(self.engine).__name__}.{failure}", Stopped)

    def announce(self, prompts: Any) -> None:
        """Tell the engine which prompts come next; it gets copies of the rows."""
        with self._told("announce failed"):
            self.engine.announce([(number, copied(dict(row))) for number, row in prompts])
        self.abilities = replace(self.abilities, agrees=False)

    def sync(self, policy: Policy) -> None:
        """Let the engine sample from the weights that this policy has now."""
        with self._told("sync failed"):
            self.engine.sync(policy)
        self.greedy_compared = False

    def close(self) -> None:
        """Close the engine. An error is only a warning, because the engine is not needed any more."""
        try:
            with self._told("close failed"):
                self.engine.close()
        except TokenrlError as error:
            warnings.warn(str(error), stacklevel=2)


def checked(
    answer: object, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, policy: Policy
) -> Rollout:
    """Return the rollout that an engine returned as training reads it: copied, on the CPU, 0 off the mask.

    The trainer's own columns are left out.

    Args:
        answer: what the engine returned.
        prompt_ids: ids of the B prompts that it was given.
        sampling: how it was to sample.
        policy: the policy that was to be sampled.

    Raises:
        WrongRollout: it is not what was asked for.
    """
    if not isinstance(answer, Rollout):
        raise WrongRollout(f"it is {shown(answer)}, not a Rollout")
    ids, present = pad_left(prompt_ids, policy.pad_id)
    index = torch.arange(len(ids)).repeat_interleave(sampling.group_size)
    sizes = {"N": len(index), "P": ids.shape[1]}
    columns: dict[str, Any] = {
        name: _declared(name, x, sizes)
        for name, x in answer.on_host().columns().items()
        if name not in OF_TRAINER
    }
    for name, column in COLUMNS.items():
        if "T" in column.axes and name in columns:
            columns[name] = zeroed(columns[name], columns["mask"])
    table = Rollout(**columns)
    prompted = replace(table, prompt_index=index, prompt_ids=ids[index], prompt_mask=present[index])
    for name, wrong, rule in _faults(table, prompted, sampling, policy):
        rows = wrong.reshape(len(index), -1).any(dim=1)
        if rows.any():
            row = int(rows.int().argmax())
            value = shown(columns[name][row].tolist())
            raise WrongRollout(f"{name} must be {rule}; in row {row} of {len(rows)} it is {value}")
    return prompted.take(torch.arange(len(index)))


def _declared(name: str, x: object, sizes: dict[str, int]) -> Tensor:
    """Return a column that an engine returned in its declared type; refuse another shape or kind of numbers.

    Args:
        name: the name of the column.
        x: the column.
        sizes: lengths of axes by their letters; those that are not known yet are added.
    """
    column = COLUMNS.get(name)
    if column is None or not isinstance(x, Tensor):
        raise WrongRollout(f"{name} is {shown(x)}; an engine fills tensors of {', '.join(COLUMNS)}")
    for axis, length in zip(column.axes, x.shape, strict=False):
        sizes.setdefault(axis, length)
    shape = [sizes.get(axis) for axis in column.axes]
    to_column = torch.can_cast(x.dtype, column.dtype)
    is_alike = to_column and torch.can_cast(column.dtype, x.dtype)
    if list(x.shape) != shape or not is_alike:
        raise WrongRollout(
            f"{name} has the shape {list(x.shape)} and numbers of type {x.dtype}, not those of {column} with {sizes}"
        )
    return x.detach().to(torch.promote_types(x.dtype, column.dtype))


def _faults(
    table: Rollout, prompted: Rollout, sampling: Sampling, policy: Policy
) -> Iterator[tuple[str, Tensor, str]]:
    """Yield columns by name, with where their numbers are wrong, given the others, and with the rule.

    What comes later reads what was right before. A comparison with NaN is False, so rules are negated.

    Args:
        table: what the engine returned, 0 off the mask.
        prompted: the same with the prompts that the engine was given.
        sampling: how the engine was to sample.
        policy: the policy that was to be sampled.
    """
    for name, x in table.columns().items():
        low, high = COLUMNS[name][2:]
        if low is not None:
            if x.dtype == torch.int64:
                high = shape_of(policy).vocab_size - 1
            is_within = (x >= low) & (x <= high + ROUNDING)
            yield name, ~is_within, f"from {low:g} to {high:g}"
    yield "prompt_index", table.prompt_index != prompted.prompt_index, "the prompts in order"
    differs = table.prompt_mask != prompted.prompt_mask
    yield "prompt_mask", differs, "True on the prompt, padded on the left"
    differs = table.prompt_ids != prompted.prompt_ids
    yield "prompt_ids", differs & prompted.prompt_mask, "those of the prompt"

    limit = sampling.max_completion_length
    ids = table.completion_ids
    counts = table.mask.sum(dim=1).clamp(1, limit)
    ends = torch.tensor(policy.eos_ids, dtype=torch.int64)
    ended = torch.isin(ids.gather(1, counts[:, None] - 1)[:, 0], ends)
    is_wrong = table.truncated == ended
    if policy.stops is not None:  # an engine may read the text of a stop string in another way
        policy.stops.end(ids, counts, ended)
        is_wrong = table.truncated & ended
    actions = completion_mask(ids, policy.eos_ids, counts)
    yield "mask", table.mask != actions, f"True on 1 to {limit} tokens, up to the first end"
    # Where a completion ends before the limit without an end, either value is wrong.
    is_wrong |= table.truncated & (counts < limit)
    yield "truncated", is_wrong, f"True where {limit} tokens have no end, and False elsewhere"
