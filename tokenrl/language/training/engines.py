"""Starts the engine that samples a run, and holds it to what it was asked for.

An engine is a `Generator` of another package or of a user. A run learns from what it returns, so each rollout
is checked before anything reads it, and the first ones are compared with the trainer. The default generator
samples from the trainer's own model, and its rollouts are taken as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from tokenrl.errors import (
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
    ROUNDING,
    check_greedy,
    check_samples,
    check_trial,
    checked,
)
from tokenrl.language.rollout.generator import (
    Abilities,
    Generator,
    TransformersGenerator,
    abilities_of,
)
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Scoring
from tokenrl.language.rollout.vllm import VllmGenerator
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.user_code import user_code

MakeGenerator = Callable[[Policy, int | None], Generator]
"""Makes a generator of a policy and the most completions that are sampled at once (None: all)."""
UNUSABLE = (
    "generate returned a rollout that cannot be used (see tokenrl.language.Rollout for its columns)"
)
ENGINES: dict[str, Any] = {"transformers": TransformersGenerator, "vllm": VllmGenerator}


def named_engine(args: TrainArguments) -> Any:
    """Return the class of the engine that the arguments name, or the user's function that makes one."""
    engine = args.generator
    return ENGINES.get(engine, engine) if isinstance(engine, str) else engine


def engine_name(args: TrainArguments) -> str:
    """Return the name of the engine that samples, or of the user's function that makes it."""
    return str(getattr(args.generator, "__name__", args.generator))


def engine_of(args: TrainArguments) -> MakeGenerator:
    """Return what makes the generator that the arguments name."""
    engine = named_engine(args)
    if engine in ENGINES.values():
        return partial(getattr(engine, "start", engine), cache=args.generator_cache)
    return engine  # type: ignore[no-any-return]


def start_engine(
    make: MakeGenerator, policy: Policy, scoring: Scoring, rows_at_once: int | None
) -> Generator:
    """Start a generator; unless it is the default one, all that it returns is checked.

    Args:
        make: makes the generator from the policy and `rows_at_once`.
        policy: the policy that is sampled.
        scoring: how the policy is scored.
        rows_at_once: the most completions that are sampled at once; None for all.

    Raises:
        Refused: the generator cannot be made, or lacks a method.
    """
    with _told("The generator could not be made", Refused):
        engine = make(policy, rows_at_once)
    if type(engine) is TransformersGenerator and engine.policy is policy:
        return engine
    return CheckedEngine(engine, policy, scoring)


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
        lost = None if isinstance(error, SystemExit) else explain(error)
        raise lost or kind(f"{failure}: {fault}.") from error


@dataclass
class CheckedEngine:
    """An engine whose rollouts are checked, and whose failures are told in words.

    Attributes:
        engine: samples the completions.
        policy: the policy that is sampled, with the weights of the trainer.
        scoring: how the policy is scored.
        greedy_compared: whether greedy completions of the present weights were compared with the trainer.
        samples_compared: whether sampled completions were compared with the trainer.
    """

    engine: Generator
    policy: Policy
    scoring: Scoring
    greedy_compared: bool = False
    samples_compared: bool = False

    @property
    def abilities(self) -> Abilities:
        """What the engine can do."""
        return abilities_of(self.engine)

    def generate(
        self, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, draws: Tensor | None
    ) -> Rollout:
        """Sample completions as `Generator.generate` says.

        Raises:
            Stopped: the engine failed, or returned something else than it was asked for.
        """
        copied = [list(ids) for ids in prompt_ids]  # an engine may change what it is given
        with self._told("generate failed"):
            answer = self.engine.generate(copied, sampling, draws)
        with self._told(UNUSABLE):
            rollout = checked(answer, prompt_ids, sampling, self.policy)
            if draws is None and not self.greedy_compared:
                check_greedy(rollout, self.policy, self.scoring)
                self.greedy_compared = True
        return rollout

    def check(self, rows: Rollout, sampling: Sampling) -> None:
        """Compare sampled completions with the trainer, whose log-probabilities they have by now.

        Those of an engine that agrees with the trainer are compared in each step, others in the first one.

        Raises:
            Stopped: the engine's numbers are of another policy or another distribution.
        """
        model: Any = self.policy.model
        agrees = self.abilities.agrees
        if self.samples_compared and not agrees:
            return
        limit = FARTHEST
        if agrees:
            limit = ROUNDING if model.dtype.itemsize >= 4 else COARSE
        with self._told(UNUSABLE):
            if agrees and not self.samples_compared:
                check_trial(rows, sampling, self.policy)
            check_samples(rows, sampling, self.policy, self.scoring, limit)
        self.samples_compared = True

    def _told(self, failure: str) -> AbstractContextManager[None]:
        """Return a context that raises `Stopped`, which names the engine, for what fails in it."""
        return _told(f"{type(self.engine).__name__}.{failure}", Stopped)

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
