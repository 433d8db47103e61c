"""Holds an engine to what it was asked for.

An engine is a `Generator` of another package or of a user. A run learns from what it returns, so each rollout
is checked before anything reads it, and the first ones are compared with the trainer. The default generator
samples from the trainer's own model, and its rollouts are taken as they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenrl.core.rows import completion_mask
from tokenrl.errors import (
    USER_CODE_FAILED,
    Refused,
    Stopped,
    TokenrlError,
    describe,
    explain,
    raised,
)
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.agreement import WrongRollout
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.engine_checks import (
    FARTHEST,
    ROUNDING,
    TOLD,
    check_greedy,
    check_trial,
    fault_of_distributions,
    fault_of_logprobs,
)
from tokenrl.language.rollout.generator import (
    Abilities,
    Generator,
    TransformersGenerator,
    abilities_of,
)
from tokenrl.language.rollout.rollout import Rollout, pad_left, to_device, zeroed
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Scoring
from tokenrl.language.rollout.vllm import VllmGenerator
from tokenrl.settings import shown
from tokenrl.user_code import user_code

ENGINES: dict[str, Any] = {"transformers": TransformersGenerator, "vllm": VllmGenerator}
METHODS = ("generate", "sync", "close")
COLUMNS = {
    "prompt_ids": ("NP", "whole numbers"),
    "prompt_mask": ("NP", "True or False"),
    "prompt_index": ("N", "whole numbers"),
    "completion_ids": ("NT", "whole numbers"),
    "mask": ("NT", "True or False"),
    "sampling_logprobs": ("NT", "finite numbers, at most 0"),
    "truncated": ("N", "True or False"),
    "sampling_distribution": (
        "NTV",
        "log-probabilities that add up to 1 and agree with sampling_logprobs",
    ),
    "top_ids": ("NTV", "whole numbers"),
}
"""The axes and the values of the columns of a `Rollout` that an engine fills: the first seven, and perhaps the
other two."""
OF_TRAINER = {"logprobs", "entropy", "score_norms", "hidden"}
"""Columns that the trainer computes itself, whatever an engine says of them."""


def named_engine(engine: Any) -> Any:
    """Return the class of the engine of a name; the user's function that makes one is returned as it is."""
    return ENGINES.get(engine, engine) if isinstance(engine, str) else engine


def engine_name(engine: Any) -> str:
    """Return the name of the engine that samples, or of the user's function that makes it."""
    return str(getattr(engine, "__name__", engine))


def engine_of(engine: Any, cache: float) -> Callable[[Policy, int | None], Generator]:
    """Return what starts a generator, by its name, of a policy and `sampling_batch_size`; `cache` is in GiB."""
    engine = named_engine(engine)
    if engine is VllmGenerator:
        return partial(engine.start, cache=cache)
    if engine is TransformersGenerator:
        return partial(engine, cache=cache)
    return engine


def start_engine(
    make: Callable[[Policy, int | None], Generator],
    policy: Policy,
    scoring: Scoring,
    rows_at_once: int | None,
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
    try:
        with user_code():
            engine = make(policy, rows_at_once)
    except TokenrlError:
        raise
    except USER_CODE_FAILED as error:
        text = f"The generator could not be made: {raised(error)}."
        raise _in_words(error, Refused(text)) from error
    if type(engine) is TransformersGenerator and engine.policy is policy:
        return engine
    if missing := [name for name in METHODS if not callable(getattr(engine, name, None))]:
        problem = f"generator made {shown(engine)}, which has no method {' and no '.join(missing)}"
        raise Refused(
            f"{problem}. It must be a function that returns a tokenrl.language.Generator."
        )
    return CheckedEngine(engine, policy, scoring)


def _in_words(error: BaseException, ours: TokenrlError) -> TokenrlError:
    """Return what used up memory or a lost process means, or else an error that names the engine."""
    if isinstance(error, SystemExit):
        return ours
    return explain(error) or ours


@dataclass
class CheckedEngine:
    """An engine whose rollouts are checked, and whose failures are told in words.

    Attributes:
        engine: samples the completions.
        policy: the policy that is sampled, with the weights of the trainer.
        scoring: how the policy is scored.
        compared: of which kinds completions were compared with the trainer already: greedy ones since the
            last weights (True), and others (False).
        checked: whether the numbers of sampled completions were compared already.
        remark: in words, how far those of later ones differed from the trainer's; empty if little.
    """

    engine: Generator
    policy: Policy
    scoring: Scoring
    compared: set[bool] = field(default_factory=set)
    checked: bool = False
    remark: str = ""

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
        answer = self._call("generate", copied, sampling, draws)
        with self._faults_told():
            rollout = checked(answer, prompt_ids, sampling, self.policy)
            if (draws is None) not in self.compared:
                if draws is None:
                    check_greedy(rollout, self.policy, self.scoring)
                elif self.abilities.agrees:
                    check_trial(rollout, sampling, self.policy)
                self.compared.add(draws is None)
        return rollout

    def check(self, rows: Rollout, sampling: Distribution) -> None:
        """Compare sampled completions with the trainer, whose log-probabilities they have by now.

        Raises:
            Stopped: the engine's numbers are of another policy or another distribution, though it has the
                weights of the start, or says that it agrees. Otherwise a `remark` tells of them.
        """
        model: Any = self.policy.model
        agrees = self.abilities.agrees
        limit = TOLD if self.checked else FARTHEST
        if agrees and model.dtype.itemsize >= 4:
            limit = ROUNDING
        with self._faults_told():
            fault = fault_of_logprobs(rows, sampling, limit)
            fault = fault or fault_of_distributions(rows, sampling, self.policy, self.scoring)
            if fault and (agrees or not self.checked):
                raise WrongRollout(fault)
        self.checked = True
        if fault:
            self.remark = f"of {type(self.engine).__name__}, {fault}"

    @contextmanager
    def _faults_told(self) -> Iterator[None]:
        """Raise `Stopped`, which names the engine, for what is wrong with a rollout in the block."""
        try:
            yield
        except Exception as error:
            fault = str(error) if isinstance(error, WrongRollout) else describe(error)
            text = f"{type(self.engine).__name__}.generate returned a rollout that cannot be used: {fault}."
            raise explain(error) or Stopped(
                f"{text} See tokenrl.language.Rollout for its columns."
            ) from error

    def sync(self, policy: Policy) -> None:
        """Let the engine sample from the weights that this policy has now."""
        self._call("sync", policy)
        self.compared.discard(True)

    def close(self) -> None:
        """Close the engine. An error is only a warning, because the engine is not needed any more."""
        try:
            self._call("close")
        except TokenrlError as error:
            warnings.warn(str(error), stacklevel=2)

    def _call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the engine."""
        try:
            with user_code():
                return getattr(self.engine, method)(*arguments)
        except TokenrlError:
            raise
        except USER_CODE_FAILED as error:
            text = f"{type(self.engine).__name__}.{method} failed: {raised(error)}."
            raise _in_words(error, Stopped(text)) from error


def checked(
    answer: Any, prompt_ids: Sequence[Sequence[int]], sampling: Sampling, policy: Policy
) -> Rollout:
    """Return the rollout that an engine returned as training reads it: copied, on the CPU, 0 off the mask.

    Args:
        answer: what the engine returned.
        prompt_ids: ids of the B prompts that it was given.
        sampling: how it was to sample.
        policy: the policy that was to be sampled.

    Raises:
        WrongRollout: it is not what was asked for.
    """
    if not isinstance(answer, Rollout):
        raise WrongRollout(f"it is {shown(answer)}")
    columns = answer.on_host().columns()
    shape = policy.model.config.get_text_config()  # type: ignore[union-attr, operator]
    columns = {name: x for name, x in columns.items() if name not in OF_TRAINER}
    if not set(list(COLUMNS)[:7]) <= columns.keys() <= COLUMNS.keys():
        raise WrongRollout(f"it has the columns {', '.join(columns)}")
    sizes = {"N": len(prompt_ids) * sampling.group_size, "V": shape.vocab_size}
    if "top_ids" in columns and sampling.keep_top is not None:
        sizes["V"] = min(sampling.keep_top, shape.vocab_size)
    for name, x in columns.items():
        columns[name] = _column(name, x, sizes)
    columns["completion_ids"] = columns["completion_ids"].masked_fill(
        ~columns["mask"], policy.pad_id
    )
    table = Rollout(**columns)
    index = torch.arange(len(prompt_ids)).repeat_interleave(sampling.group_size)
    prompts, present = (x[index] for x in pad_left(prompt_ids, policy.pad_id))
    asked: dict[str, Any] = {"prompt_index": index, "prompt_ids": prompts, "prompt_mask": present}
    for words, wrong in _faults(table, asked, sampling, policy):
        if wrong.any():
            raise WrongRollout(f"{words}, first in row {int(wrong.int().argmax())} of {len(wrong)}")
    for name in columns.keys() & list(COLUMNS)[7:] | {"sampling_logprobs"}:
        asked[name] = zeroed(columns[name], table.mask)
    return replace(table, **asked).cut(prompts.shape[1], int(table.mask.sum(dim=1).max()))


def _column(name: str, x: Any, sizes: dict[str, int]) -> Tensor:
    """Return a copy of a column in the type that training reads; refuse one of another shape or kind.

    Args:
        name: its name.
        x: the column.
        sizes: the lengths of the axes that are known; others are added as columns have them.
    """
    axes, kind = COLUMNS[name]
    if not isinstance(x, Tensor):
        raise WrongRollout(f"{name} is {shown(x)}, not a tensor")
    expected = [sizes.setdefault(axis, size) for axis, size in zip(axes, x.shape, strict=False)]
    if x.ndim != len(axes) or list(x.shape) != expected:
        words = ", ".join(f"{axis} = {sizes[axis]}" if axis in sizes else axis for axis in axes)
        raise WrongRollout(f"{name} has the shape {list(x.shape)} instead of [{words}]")
    whole = not (x.is_floating_point() or x.is_complex())
    if kind == "True or False":
        dtype = torch.bool
        fits = bool(((x == 0) | (x == 1)).all())
    elif kind == "whole numbers":
        dtype = torch.int64
        fits = whole and x.dtype != torch.bool
    else:
        dtype = torch.promote_types(x.dtype, torch.float32)
        fits = x.is_floating_point()
    if not fits:
        raise WrongRollout(f"{name} has numbers of type {x.dtype}; they must be {kind}")
    return x.detach().to(dtype, copy=True)


def _faults(
    table: Rollout, asked: dict[str, Tensor], sampling: Sampling, policy: Policy
) -> Iterator[tuple[str, Tensor]]:
    """Yield what may be wrong with the rows of a table, in words, and for which rows it is [N].

    What comes later reads what was right before.
    """
    mask = table.mask
    ids = table.completion_ids
    present = asked["prompt_mask"]
    counts = mask.sum(dim=1)
    limit = sampling.max_completion_length
    yield (
        "prompt_index does not count the prompts in order",
        table.prompt_index != asked["prompt_index"],
    )
    prompts = table.cut(present.shape[1], mask.shape[1])
    same = (prompts.prompt_mask == present) & (
        (prompts.prompt_ids == asked["prompt_ids"]) | ~present
    )
    longer = table.prompt_mask.sum(dim=1) != present.sum(dim=1)
    yield "the prompt is not the one that was given, padded on the left", longer | ~same.all(dim=1)
    yield "a completion has no token", counts == 0
    yield f"a completion has more than {limit} tokens", counts > limit
    vocabulary: int = policy.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    outside = (ids < 0) | (ids >= vocabulary)
    yield (
        f"completion_ids holds other numbers than 0 to {vocabulary - 1}",
        (outside & mask).any(dim=1),
    )
    if table.top_ids is not None:
        ordered = table.top_ids.sort(dim=2).values.cpu()
        wrong = (ordered.diff(dim=2) == 0).any(dim=2) | (ordered[..., 0] < 0)
        wrong |= ordered[..., -1] >= vocabulary
        yield (
            f"top_ids holds a number twice, or others than 0 to {vocabulary - 1}",
            (wrong & mask).any(dim=1),
        )
    actions = completion_mask(ids, policy.eos_ids, counts)
    yield (
        "mask is not True up to the first end, and False from there on",
        (mask != actions).any(dim=1),
    )
    ended = torch.isin(
        ids.gather(1, counts[:, None] - 1)[:, 0], torch.tensor(policy.eos_ids).long()
    )
    if policy.stops is None:
        wrong = ended == table.truncated
    else:  # an engine may read the text of a stop string in another way
        ends = counts.clone()
        policy.stops.end(ids, ends, ended)
        yield "a completion goes on behind a stop string", ends != counts
        wrong = ended & table.truncated
    yield "a completion has neither an end nor truncated = True, or both", wrong
    short = table.truncated & (counts < limit)
    yield f"a completion is truncated although it has fewer than {limit} tokens", short
    for name, x in table.columns().items():
        kind = COLUMNS[name][1]
        if kind.startswith(("finite", "log")):
            yield f"{name} must be {kind}", (mask & ~_in_range(x, table, kind).cpu()).any(dim=1)


def _in_range(x: Tensor, table: Rollout, kind: str) -> Tensor:
    """Return of which tokens the numbers are of a kind, but for rounding [N, T]."""
    if kind.startswith("log"):
        ids = to_device(table.completion_ids[..., None], x.device)
        sampled = to_device(table.sampling_logprobs[..., None], x.device)
        total = x.logsumexp(dim=2)
        if table.top_ids is not None:  # the sampled token may be another
            apart = (x - sampled).masked_fill(table.top_ids != ids, 0).abs().amax(dim=2)
            return (total <= ROUNDING) & (apart <= ROUNDING)
        apart = (x.gather(2, ids) - sampled).squeeze(2).abs()
        return (total.abs() <= ROUNDING) & (apart <= ROUNDING)
    return x.isfinite() & (x <= ROUNDING)
