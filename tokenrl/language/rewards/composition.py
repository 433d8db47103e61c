"""Loads rewards by name, and combines rewards into a product or a gate.

A weighted sum needs no combination: several rewards are summed with `reward_weights`. A product or a gate is
itself a reward with TRL's signature. It may abstain, takes columns, may be a part of another one, and logs
the mean reward of each part as `rewards/{part}/mean`.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenrl.errors import Refused, describe, suggest
from tokenrl.language.rewards.calls import (
    Reward,
    accepted_arguments,
    checked_rewards,
    run_rewards,
    unique_names,
)
from tokenrl.language.rewards.declared import declared_range, is_binary, range_of_product
from tokenrl.language.rewards.library import LIBRARY
from tokenrl.language.rewards.model import RewardModel
from tokenrl.names import import_attribute

NOT_A_ROW = ("trainer_state", "log_extra", "log_metric")
_LIBRARY_SPEC = re.compile(r"\s*[A-Za-z_]\w*\s*(?:\(.*)?", re.DOTALL)


class _Composed:
    """Named parts that are called together and checked, as the functions of a weighted sum are."""

    def __init__(self, *parts: Any) -> None:
        functions = [load_reward(part) for part in parts]
        self.parts = dict(zip(unique_names(functions), functions, strict=True))
        self.ranges = [declared_range(part, name) for name, part in self.parts.items()]

    def check_columns(self, available: Iterable[str]) -> None:
        """Check that every part gets the arguments it asks for.

        Raises:
            Refused: a part asks for a column that does not exist.
        """
        check_columns(self.parts, available)

    def _values(self, arguments: Mapping[str, Any]) -> np.ndarray:
        """Rewards of the P parts [N, P], nan where a part abstained; logs the mean of each part."""
        rows = {name: values for name, values in arguments.items() if name not in NOT_A_ROW}
        shared = {name: arguments[name] for name in NOT_A_ROW if name in arguments}
        attempts = run_rewards(self.parts, rows, shared)
        log = shared.get("log_metric") or (lambda name, value: None)
        columns = []
        for name, attempt in zip(self.parts, attempts, strict=True):
            columns.append(checked_rewards(name, attempt.output, rows["completions"]))
            if not np.isnan(columns[-1]).all():
                log(f"rewards/{name}/mean", float(np.nanmean(columns[-1])))
        return np.stack(columns, axis=1)


class Product(_Composed):
    """The product of the rewards of its parts, `prod_p r_p`; abstains where any part does.

    If all rewards lie in [0, 1], the product is high only where all of them are high: correct AND well
    formed. Two negative rewards give a positive product, so the parts should not be negative. The product of
    binary rewards is binary, and it has a range if all of them have one.

    Example:
        >>> Product("exact_match", "valid_json(required=['answer'])")  # on the command line: product(...)
    """

    __name__ = "product"

    def __init__(self, *parts: Any) -> None:
        """Take the parts.

        Args:
            *parts: two rewards or more, as `load_reward` takes them.

        Raises:
            Refused: there are fewer than two parts, or one of them is not a reward.
        """
        if len(parts) < 2:
            raise Refused(f"product was given {len(parts)} rewards; give two or more to multiply.")
        super().__init__(*parts)
        self.binary = all(map(is_binary, self.parts.values()))
        self.range = range_of_product(self.ranges)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        """Reward N completions."""
        values = self._values({"prompts": prompts, "completions": completions, **columns})
        return _with_abstentions(values.prod(axis=1))


class Gate(_Composed):
    """A reward that counts only where a condition is met: `r_2 if r_1 >= threshold else 0`.

    The condition r_1 itself adds nothing to the reward; to reward it too, name it beside the gate. The gate
    abstains where the condition abstains, and where the condition is met but the reward abstains. The reward
    is also called on rows below the threshold, because functions see whole batches. The gate is binary if
    the reward is, and has a range if the reward has one, whatever the condition.

    Example:
        >>> Gate("exact_match", "length(target=20)", threshold=1)  # on the command line: gate(...)
    """

    __name__ = "gate"

    def __init__(self, *parts: Any, threshold: float = 1.0) -> None:
        """Take the condition and the reward.

        Args:
            *parts: the condition and the reward, as `load_reward` takes them.
            threshold: the least reward of the condition at which the second reward counts.

        Raises:
            Refused: there are not exactly two parts, one of them is not a reward, or the threshold is not a
                number.
        """
        if len(parts) != 2 or isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise Refused(
                f"gate was given {len(parts)} rewards and threshold={threshold!r}; give two rewards, the "
                "condition first, and a number: gate(exact_match, length(target=20), threshold=1)."
            )
        super().__init__(*parts)
        self.threshold = float(threshold)
        self.binary, inner = is_binary(list(self.parts.values())[1]), self.ranges[1]
        self.range = inner and (min(inner[0], 0.0), max(inner[1], 0.0))

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        """Reward N completions."""
        condition, reward = self._values({"prompts": prompts, "completions": completions, **columns}).T
        gated = np.where(condition >= self.threshold, reward, 0.0)
        return _with_abstentions(np.where(np.isnan(condition), np.nan, gated))


def _with_abstentions(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def check_columns(named: Mapping[str, Reward], available: Iterable[str]) -> None:
    """Check that every function gets the arguments that its signature or its options ask for.

    Args:
        named: the functions by their names.
        available: names of the arguments that exist.

    Raises:
        Refused: a parameter without a default, or a column that an option names, is not available.
    """
    available = dict.fromkeys(available)
    for name, function in named.items():
        accepted_arguments(function, name, available)
        if hasattr(function, "check_columns"):
            function.check_columns(available)


def load_reward(spec: Any) -> Reward:
    """Find or load the reward that a user names.

    Args:
        spec: a callable, which is returned as it is; a reward of the library, such as `exact_match`,
            `length(target=20)` or `gate(exact_match, length(target=20))`, with plain values as options and
            rewards as parts; `module:function` (the current directory is importable);
            `path/to/file.py:function`; or a folder with a sequence-classification model of one label and its
            tokenizer.

    Returns:
        A function `f(prompts, completions, **columns) -> list[float | None]`, where None abstains.

    Raises:
        Refused: `spec` is none of these, importing or loading it failed, or the result cannot be called.
    """
    if callable(spec):
        return spec
    if not isinstance(spec, str | Path):
        raise Refused(f"reward {spec!r:.100} is a {type(spec).__name__}; give a callable or the name of one.")
    if os.path.isdir(spec):
        return RewardModel(spec)
    text = str(spec)
    if _LIBRARY_SPEC.fullmatch(text):
        return _from_library(text)
    if ":" not in text:
        raise Refused(f"reward '{text}': there is no such folder here. {_FORMS}")
    found = import_attribute(text, "reward")
    if not callable(found):
        raise Refused(
            f"reward '{text}' is a {type(found).__name__}, which cannot be called; name a function."
        )
    return found


_FORMS = (
    "Give module:function, path/to/file.py:function, the folder of a sequence-classification model with one "
    "label, or a reward of the library, such as length(target=20)."
)
_COMPOSED: dict[str, Any] = {"product": Product, "gate": Gate}


def _from_library(text: str) -> Reward:
    try:
        return _build(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused(
            f"reward '{text}' cannot be read ({describe(error)}). Write options as name=value with plain "
            "values: length(target=20), exact_match(column='target'). The parts of product and gate come "
            "before their options."
        ) from error


def _build(node: ast.expr, text: str) -> Reward:
    """The reward of a parsed spec. Options are literals, read by `ast.literal_eval`; no code is evaluated."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a part that is not in the library
        return load_reward(node.value)
    if not isinstance(call.func, ast.Name):
        raise ValueError(f"'{ast.unparse(node)}' is not the name of a reward")
    name, known = call.func.id, LIBRARY | _COMPOSED
    if name not in known:
        raise Refused(
            f"reward '{text}': the library has no reward '{name}', and there is no such folder here."
            f"{suggest(name, known)} {_FORMS}"
        )
    if call.args and name not in _COMPOSED:
        raise ValueError(f"{name} takes its options by name only")
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    if len(options) != len(call.keywords):
        raise ValueError("** is not allowed")
    parts: Sequence[Reward] = [_build(part, text) for part in call.args]
    try:
        return known[name](*parts, **options)
    except TypeError as error:
        reason = str(error).partition(") ")[2] or str(error)
        raise Refused(f"reward '{text}': {name} {reason}. {known[name].__doc__.splitlines()[0]}") from error
