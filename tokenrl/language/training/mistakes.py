"""Names settings that contradict each other or do nothing, which are mistakes. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import NamedTuple

from tokenrl.errors import Refused
from tokenrl.language.training.arguments import TrainArguments, TrainSettings


class _Needs(NamedTuple):
    """What a setting needs, without which it does nothing."""

    there: Callable[[TrainSettings], bool]
    words: str


_CRITIC = _Needs(lambda args: args.estimator.needs_values, "the estimator has no critic")
_NEEDS = {
    "max_refills": _Needs(lambda args: args.estimator.zero_spread == "refill", "zero_spread is not 'refill'"),
    "value_learning_rate": _CRITIC,
    "value_iterations": _CRITIC,
    "kl_gain": _Needs(lambda args: args.target_kl is not None, "target_kl is not set"),
    "warm_start_steps": _Needs(lambda args: args.warm_start, "warm_start is not set"),
}


def check_rate(args: TrainArguments) -> None:
    """Refuse to train without a learning rate where none can be recommended.

    Raises:
        Refused: the optimiser is SGD, and no learning rate is given.
    """
    if args.optimizer == "sgd" and args.learning_rate is None:
        raise Refused(
            "optimizer='sgd' was given without a learning_rate, and the default rates are made for AdamW. A "
            "step of AdamW at the rate r has a norm of about r x sqrt(number of weights) at most, and one of "
            "SGD learning_rate x grad_norm (a metric, at most max_grad_norm after clipping). Start with the "
            "rate that makes both equal, such as 2e-4 x sqrt(100,000) / 1, about 0.06, and try factors of 2 "
            "around it: --learning-rate 0.06."
        )


def check_sizes(args: TrainSettings) -> None:
    """Refuse settings that do not fit the length of completions.

    Raises:
        Refused: the overlong buffer takes the whole completion.
    """
    if args.estimator.overlong_buffer >= args.max_completion_length:
        raise Refused(
            f"overlong_buffer={args.estimator.overlong_buffer} is not less than max_completion_length="
            f"{args.max_completion_length}, so every completion would be penalised for its length, from the "
            "first token on. Give a shorter buffer (DAPO takes a fifth of the length), or a larger "
            "max_completion_length."
        )


def without_effect(args: TrainSettings, asked: TrainArguments) -> Iterator[str]:
    """Yield a warning for each setting that was changed, but cannot do what it is for beside the others.

    Args:
        args: the settings of the run.
        asked: what was asked for.
    """
    if args.max_samples is not None and asked.max_steps not in (None, args.max_steps):
        yield (
            f"max_steps={asked.max_steps} has no effect, because max_samples={args.max_samples} says how "
            f"long the run is: {args.max_steps} steps or fewer. Leave one of the two out."
        )
    if args.warmup_steps >= args.max_steps:
        yield (
            f"warmup_steps={args.warmup_steps} is not less than max_steps={args.max_steps}, so the learning "
            f"rate never reaches {args.learning_rate:g}. Give fewer; a tenth of the run is usual."
        )
    usual = {field.name: field.default for field in fields(args)}
    for name, needs in _NEEDS.items():
        value = getattr(args, name)
        if value != usual[name] and not needs.there(args):
            yield f"{name}={value} has no effect, because {needs.words}. Leave it out, or set what it needs."
