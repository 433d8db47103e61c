"""signatures.pyi shows type checkers and editors the keywords of the public functions, and is current.

`python tests/house/test_signatures.py` writes it anew, after a change of a setting.
"""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Any

import tokenrl
from tokenrl.control.arguments import ControlArguments
from tokenrl.core.estimator import Estimator
from tokenrl.lab import measure_gradients
from tokenrl.lab.compare.arguments import CompareArguments
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.language.commands.arguments import EvaluateArguments, SampleArguments
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.tasks.sources import DataArguments
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import OR_FUNCTION, OR_OBJECT, field_types

STUB = Path(tokenrl.__file__).with_name("signatures.pyi")
HEAD = """# Written by tests/house/test_signatures.py: keywords of the public functions, for type checkers.
import os
import typing
from collections.abc import Callable, Mapping, Sequence

{imports}

"""
TASK = "name: typing.Any, *, reward: typing.Any = ..., seed: int = ..., chat: bool = ..."
BOTH = (TrainArguments, ControlArguments)
FUNCTIONS: list[tuple[str, Any, str, str, tuple[Any, ...]]] = [
    (
        "train",
        TrainArguments,
        "*, callback: Callable[[int, dict[str, typing.Any]], typing.Any] | None = ...",
        "RunResult",
        (),
    ),
    ("sft", SftArguments, "*", "SftResult", ()),
    ("train_reward_model", RewardModelArguments, "*", "RewardModelResult", ()),
    ("train_agent", ControlArguments, "*, agent: str | None = ...", "ControlResult", ()),
    ("evaluate", EvaluateArguments, "*, model: str | os.PathLike[str] = ...", "Evaluation", ()),
    (
        "evaluate",
        EvaluateArguments,
        "*, model: list[str] | tuple[str, ...]",
        "dict[str, Evaluation]",
        (),
    ),
    ("sample", SampleArguments, "*", "list[list[str]]", ()),
    ("compare", CompareArguments, "*", "Comparison | Plan", BOTH),
    ("measure_gradients", MeasureArguments, "*", "Measured", ()),
    ("load_task", DataArguments, TASK, "PromptTask", ()),
]
RESULTS = {
    "tokenrl.control.run": ("ControlResult",),
    "tokenrl.lab.compare.comparison": ("Comparison",),
    "tokenrl.lab.compare.plan": ("Plan",),
    "tokenrl.lab.measure.measurement": ("Measured",),
    "tokenrl.language.preferences.fit": ("RewardModelResult",),
    "tokenrl.language.tasks.task": ("PromptTask",),
    "tokenrl.language.evaluation.evaluation": ("Evaluation",),
    "tokenrl.language.training.run": ("RunResult",),
    "tokenrl.language.supervised.sft": ("SftResult",),
    "tokenrl.core.estimator": ("Estimator",),
}


def written(hint: Any) -> str:
    """A type as a keyword takes it: a value or several for a tuple, a path for text, a preset's name."""
    metadata, origin, parts = (
        getattr(hint, "__metadata__", ()),
        typing.get_origin(hint),
        typing.get_args(hint),
    )
    if OR_OBJECT in metadata:
        return "typing.Any"
    if OR_FUNCTION in metadata:
        return f"{written(parts[0])} | str | Callable[..., typing.Any]"
    if metadata:
        return written(parts[0])
    if origin is typing.Literal:
        return f"typing.Literal[{', '.join(map(repr, parts))}]"
    if origin is tuple:
        item = written(parts[0])
        return f"{item} | Sequence[{item}]"
    if parts:
        return " | ".join(
            dict.fromkeys(word for part in parts for word in written(part).split(" | "))
        )
    if hint is Estimator:
        return "Estimator | str | Mapping[str, typing.Any]"
    names = {str: "str | os.PathLike[str]", type(None): "None", Any: "typing.Any"}
    return names.get(hint) or hint.__name__


def keywords(kind: Any) -> dict[str, str]:
    hints = {name: written(hint) for name, hint in field_types(kind).items()}
    if "chat_template_kwargs" in hints:
        hints["chat_template_kwargs"] += " | Mapping[str, typing.Any]"
    return {n: re.sub(r"(.*)( [|] None)(.+)", r"\1\3\2", hint) for n, hint in hints.items()}


def signatures() -> str:
    """The content of signatures.pyi."""
    names = [function[0] for function in FUNCTIONS]
    imports = [f"from {kind.__module__} import {kind.__name__}" for _, kind, *_ in FUNCTIONS]
    imports += [f"from {module} import {', '.join(results)}" for module, results in RESULTS.items()]
    parts = [HEAD.format(imports="\n".join(sorted(set(imports))))]
    for name, kind, first, result, shared in FUNCTIONS:
        hints = keywords(kind)
        for other in shared:  # either command may have it, with another type
            hints = dict.fromkeys(keywords(other), "typing.Any") | hints
        required = [
            n for n, p in inspect.signature(kind).parameters.items() if p.default is p.empty
        ]
        lines = [
            f"    {n}: {hint}{'' if n in required else ' = ...'},"
            for n, hint in sorted(hints.items())
            if not re.search(rf"\b{n}:", first)
        ]
        takes_args = (
            "args" in inspect.signature(getattr(tokenrl, name, measure_gradients)).parameters
        )
        opening = f"args: {kind.__name__} | None = ..., {first}" if takes_args else first
        overload = "@typing.overload\n" if names.count(name) > 1 else ""
        parts.append(
            f"{overload}def {name}(\n    {opening},\n"
            + "\n".join(lines)
            + f"\n) -> {result}: ...\n"
        )
    return "\n".join(parts)


def test_the_signatures_are_those_of_the_settings():
    assert STUB.read_text(encoding="utf-8") == signatures(), f"run python {Path(__file__).name}"


if __name__ == "__main__":
    STUB.write_text(signatures(), encoding="utf-8")
