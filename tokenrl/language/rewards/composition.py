"""From what a user names to a reward, and rewards made of others: a product, and a gate.

A weighted sum needs nothing of this: several rewards are summed with `reward_weights`. What stands here is
a reward like any other (TRL's signature, abstentions, columns), logs each part as `rewards/{part}/mean`, and
may be a part itself.
"""

from __future__ import annotations

import ast
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
from tokenrl.language.rewards.library import LIBRARY
from tokenrl.language.rewards.model import RewardModel
from tokenrl.names import import_attribute

NOT_A_ROW = ("trainer_state", "log_extra", "log_metric")
_LIBRARY_SPEC = re.compile(r"\s*[A-Za-z_]\w*\s*(?:\(.*)?", re.DOTALL)


class _Composed:
    """Parts with names, called together and checked as the parts of a weighted sum are."""

    def __init__(self, *parts: Any) -> None:
        self.parts = [load_reward(part) for part in parts]
        self.names = unique_names(self.parts)

    def check_columns(self, available: Iterable[str]) -> None:
        """Check that every part gets what it asks for.

        Raises:
            Refused: a part asks for a column that is not there.
        """
        check_columns(dict(zip(self.names, self.parts, strict=True)), available)

    def _values(self, arguments: Mapping[str, Any]) -> np.ndarray:
        """Rewards of the parts [N, P], nan where a part abstained; logs their means."""
        rows = {name: values for name, values in arguments.items() if name not in NOT_A_ROW}
        shared = {name: arguments[name] for name in NOT_A_ROW if name in arguments}
        outputs = run_rewards(dict(zip(self.names, self.parts, strict=True)), rows, shared)
        log = shared.get("log_metric") or (lambda name, value: None)
        columns = []
        for name, output in zip(self.names, outputs, strict=True):
            columns.append(checked_rewards(name, output, rows["completions"]))
            if not np.isnan(columns[-1]).all():
                log(f"rewards/{name}/mean", float(np.nanmean(columns[-1])))
        return np.stack(columns, axis=1)


class Product(_Composed):
    """The product of its parts' rewards, `prod_p r_p`; abstains where any part does.

    Of rewards in [0, 1] it is high only where all are: correct AND well formed. Two negative rewards make a
    positive one, so give it rewards that are not negative.

    Example:
        >>> Product("exact_match", "valid_json(required=['answer'])")  # on the command line: product(...)
    """

    __name__ = "product"

    def __init__(self, *parts: Any) -> None:
        """Take the parts.

        Args:
            *parts: two rewards or more, as `load_reward` takes them.

        Raises:
            Refused: fewer than two parts, or one that is no reward.
        """
        if len(parts) < 2:
            raise Refused(f"product was given {len(parts)} rewards; give two or more to multiply.")
        super().__init__(*parts)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        """Reward N completions."""
        values = self._values({"prompts": prompts, "completions": completions, **columns})
        return _with_abstentions(values.prod(axis=1))


class Gate(_Composed):
    """A reward that counts only where a condition is met: `r_2 if r_1 >= threshold else 0`.

    The condition itself adds nothing; name it beside the gate to be paid for it too. Abstains where the
    condition does, and where it is met and the reward abstains. Below the threshold the reward is called all
    the same: functions see whole batches.

    Example:
        >>> Gate("exact_match", "length(target=20)", threshold=1)  # on the command line: gate(...)
    """

    __name__ = "gate"

    def __init__(self, *parts: Any, threshold: float = 1.0) -> None:
        """Take condition and reward.

        Args:
            *parts: the condition and the reward, as `load_reward` takes them.
            threshold: least reward of the condition with which the second reward counts.

        Raises:
            Refused: not exactly two parts, one that is no reward, or a threshold that is no number.
        """
        if len(parts) != 2 or isinstance(threshold, bool) or not isinstance(threshold, int | float):
            raise Refused(
                f"gate was given {len(parts)} rewards and threshold={threshold!r}; give two rewards, the "
                "condition first, and a number: gate(exact_match, length(target=20), threshold=1)."
            )
        super().__init__(*parts)
        self.threshold = float(threshold)

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
        """Reward N completions."""
        condition, reward = self._values({"prompts": prompts, "completions": completions, **columns}).T
        gated = np.where(condition >= self.threshold, reward, 0.0)
        return _with_abstentions(np.where(np.isnan(condition), np.nan, gated))


def _with_abstentions(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


def check_columns(named: Mapping[str, Reward], available: Iterable[str]) -> None:
    """Check that every function gets what it asks for, in its signature or in options of the library.

    Args:
        named: the functions by their names.
        available: arguments that there are.

    Raises:
        Refused: a parameter without default, or a column named in an option, is not among them.
    """
    available = dict.fromkeys(available)
    for name, function in named.items():
        accepted_arguments(function, name, available)
        if hasattr(function, "check_columns"):
            function.check_columns(available)


def load_reward(spec: Any) -> Reward:
    """Make a reward of what a user gives.

    Args:
        spec: a callable; a reward of the library, as `exact_match`, `length(target=20)` or
            `gate(exact_match, length(target=20))`, with plain values as options and rewards as parts;
            `module:function` (the current directory is importable); `path/to/file.py:function`; or a folder
            with a sequence-classification model of one label and its tokenizer.

    Raises:
        Refused: none of these, an error while importing or loading, or something that cannot be called.
    """
    if callable(spec):
        return spec
    if not isinstance(spec, str | Path):
        raise Refused(f"reward {spec!r:.100} is a {type(spec).__name__}; give a callable or the name of one.")
    if Path(spec).is_dir():
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
    "Give module:function, path/to/file.py:function, or the folder of a sequence-classification model with "
    "one label; or a reward of the library, as length(target=20)."
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
            "values: length(target=20), exact_match(column='target'); parts of product and gate come first."
        ) from error


def _build(node: ast.expr, text: str) -> Reward:
    """The reward of a parsed spec; options are literals, read by `ast.literal_eval` and never evaluated."""
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a part that is no library reward
        return load_reward(node.value)
    if not isinstance(call.func, ast.Name):
        raise ValueError(f"'{ast.unparse(node)}' is no name of a reward")
    name, known = call.func.id, LIBRARY | _COMPOSED
    if name not in known:
        raise Refused(
            f"reward '{text}': the library has no reward '{name}', and there is no such folder here."
            f"{suggest(name, known)} {_FORMS}"
        )
    if call.args and name not in _COMPOSED:
        raise ValueError(f"{name} takes options by name only")
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    if len(options) != len(call.keywords):
        raise ValueError("** is not allowed")
    parts: Sequence[Reward] = [_build(part, text) for part in call.args]
    try:
        return known[name](*parts, **options)
    except TypeError as error:
        reason = str(error).partition(") ")[2] or str(error)
        raise Refused(f"reward '{text}': {name} {reason}. {known[name].__doc__.splitlines()[0]}") from error
