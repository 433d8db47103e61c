"""What a setting may be: one sentence for every command and field; settings from keywords and files."""

from __future__ import annotations

import inspect
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from refusals import refused

import tokenrl.lab
from tokenrl.cli import COMMANDS
from tokenrl.core import Estimator
from tokenrl.errors import Refused
from tokenrl.flags import described_fields, parse
from tokenrl.lab.compare.problems import read_arm
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.settings import (
    OR_OBJECT,
    Bounds,
    Count,
    Settings,
    arguments,
    field_types,
    lay,
)


def leaves(hint: Any, bounds: Bounds = Bounds()) -> list[tuple[Any, Bounds]]:  # noqa: B008
    """The types of the values that a type allows, each with its bounds, whatever they are wrapped in."""
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        return leaves(hint, next((m for m in metadata if isinstance(m, Bounds)), bounds))
    if get_origin(hint) in (typing.Union, UnionType, tuple):
        return [leaf for part in get_args(hint) for leaf in leaves(part)]
    return [(hint, bounds)]


def just_outside(number: type, bounds: Bounds) -> list[tuple[float, str]]:
    """A value beyond each bound, as near as can be, and the words for the bound."""
    cases = []
    for words, limit in bounds.limits().items():
        shift = -1 if words in ("of at least", "above") else 1
        value = limit + shift if number is int else math.nextafter(limit, shift * math.inf)
        cases.append((value, f"{words} {limit:,.12g}"))
    return cases


def wrong_values(hint: Any) -> Iterator[tuple[Any, str]]:
    """Yield values that a type does not allow, and what the message says of it."""
    types = dict(leaves(hint))
    for kind, bounds in types.items():
        if kind in (int, float):
            whole = "a whole number" if kind is int else "a finite number"
            yield from just_outside(kind, bounds)
            texts = [] if str in types else ["3x"]
            halves = [1.5] if kind is int and float not in types else []
            for value in (*texts, math.nan, math.inf, 10**400, True, *halves):
                if not (value is True and bool in types):
                    yield value, whole
        elif get_origin(kind) is Literal:
            words = "one of " + ", ".join(map(str, get_args(kind)))
            yield "no such name", words
            if not {int, float} & types.keys():
                yield 7.5, words
        elif kind is bool:
            yield "yes", "True or False"
    if {*types} <= {str, NoneType, Ellipsis}:
        for value in (5, {"a": 1}, [3], True, "\udcff"):
            yield value, ""


OWNERS = {
    (owner, field.name): command.arguments
    for command in COMMANDS.values()
    for owner, field, _ in described_fields(command.arguments)
} | {(Estimator, field.name): Estimator for field in fields(Estimator)}
"""Each field of all settings, with the arguments of a command that has it."""


@pytest.mark.parametrize("owner", dict.fromkeys(owner for owner, _ in OWNERS))
def test_a_field_refuses_what_its_type_does_not_allow(owner):
    for name in (name for other, name in OWNERS if other is owner):
        check_field(OWNERS[owner, name], name)


def check_field(kind, name):
    hint = field_types(kind)[name]
    types = dict(leaves(hint))
    if name in ("estimator", "chat_template_kwargs") or OR_OBJECT in str(hint):
        return  # these take objects
    for number in {int, float} & types.keys():
        bounds = types[number]
        assert len(bounds.limits()) == 2
        assert not name.endswith("seed") or bounds == Bounds(at_least=0, at_most=2**32 - 1)
    needed = {"run_dir": ()} if "run_dir" in field_types(kind) else {}  # it has no default
    for value, words in wrong_values(hint):
        with pytest.raises(Refused) as error:
            arguments(kind, needed | {name: value})
        message = str(error.value)
        assert f"{name} was given as " in message and words in message, (value, message)
        assert "\n" not in message and len(message) < 700


@pytest.mark.parametrize(
    ("name", "command"),
    [
        *((name, name) for name in ("train", "sft", "evaluate", "sample", "compare")),
        ("train_reward_model", "reward-model"),
        ("train_agent", "control"),
        ("measure_gradients", "lab measure"),
    ],
)
def test_the_signature_and_the_help_of_a_function_have_the_keywords(name, command):
    function, kind = (
        getattr(tokenrl, name, getattr(tokenrl.lab, name, None)),
        COMMANDS[command].arguments,
    )
    signature = inspect.signature(function)
    for field in fields(kind):
        parameter = signature.parameters[field.name]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == field.default or field.default is MISSING
        assert parameter.default is not None or ": Optional[" in str(parameter)
        takes_objects = "or an object" in str(field_types(kind)[field.name])
        assert takes_objects == ("Any" in str(parameter)) or field.name == "shared"
    assert "NoneType" not in str(signature)


@dataclass(frozen=True)
class Sample(Settings):
    """A class with every sort of field."""

    count: Count = 1
    sizes: tuple[Count, ...] = (1,)
    span: tuple[float, float] | None = None
    words: tuple[str, ...] = ()
    place: str = "here"
    estimator: Estimator = Estimator()  # noqa: RUF009


def test_a_function_stands_for_a_name_where_one_may():
    assert Estimator(baseline=max).baseline is max
    with refused("scale was given as <built-in function max>"):
        Estimator(scale=max)


def test_arguments_are_made_of_keywords():
    sample = arguments(
        Sample, {"words": "one", "sizes": [2, 3], "place": Path("a") / "b", "estimator": "grpo"}
    )
    grpo, path = Estimator.preset("grpo"), str(Path("a") / "b")
    assert sample == Sample(words=("one",), sizes=(2, 3), place=path, estimator=grpo)
    assert arguments(Sample, {"words": None, "span": None, "count": "1"}) == Sample()
    assert arguments(Sample, {"estimator": {"beta": 0.5}}).estimator == Estimator(beta=0.5)
    for options, sentence in (
        (
            {"span": (1.0,)},
            "span was given as .*; it must be 2 values, each a finite number, or None",
        ),
        ({"cuont": 2}, r"There is no setting 'cuont'. Did you mean 'count'\? Available: count, "),
        ({"estimator": {"betta": 1}}, r"There is no setting 'betta'. Did you mean 'beta'\?"),
        (
            {"estimator": "grop"},
            r"preset was given as 'grop'. Did you mean 'grpo'\? It must be one of r",
        ),
    ):
        with refused(sentence):
            arguments(Sample, options)


WITHOUT_STD = Estimator.preset("grpo", scale="none", epsilon=0.3)


@pytest.mark.parametrize(
    "written",
    [
        "grpo,scale=none,epsilon=0.3",
        "GRPO, --estimator.scale=No-ne, epsilon = .3",
        {"preset": "GRPO,scale=none", "epsilon": 0.3},
    ],
)
def test_an_estimator_is_written_in_one_way_everywhere(written, tmp_path):
    assert arguments(Sample, {"estimator": written}).estimator == WITHOUT_STD
    (tmp_path / "mine.yaml").write_text(f"estimator: {json.dumps(written)}\n")
    lines = [["--config", str(tmp_path / "mine.yaml")]]
    if isinstance(written, str):
        lines.append(["--estimator", written])
        assert dict(read_arm(written, {}, Sample).estimator.__dict__) == dict(WITHOUT_STD.__dict__)
    for words in lines:
        assert parse("train", COMMANDS["train"], words).estimator == WITHOUT_STD


def test_numbers_of_numpy_and_torch_become_plain():
    args = TrainArguments(
        seed=np.int64(3),
        learning_rate=np.float32(0.5),
        max_steps=torch.tensor(4),
        warm_start=np.bool_(False),
        reward_weights=np.array([1.0, 0.5]),
    )
    values = [args.seed, args.learning_rate, args.max_steps, args.warm_start, args.reward_weights]
    assert json.dumps(values) == "[3, 0.5, 4, false, [1.0, 0.5]]"
    assert type(Estimator(beta=np.float64(0.5)).beta) is float
    with refused("seed was given as -1"):
        TrainArguments(seed=np.int64(-1))


def test_names_and_lists_of_numbers_are_taken_in_the_forms_that_people_write():
    words = "--reward-weights 1,0.3 -2 --optimizer AdamW --estimator.baseline Group-Mean --dtype BFloat16"
    args = parse("train", COMMANDS["train"], words.split())
    assert args.reward_weights == (1, 0.3, -2) and args.dtype == "bfloat16"
    assert (args.optimizer, args.estimator.baseline) == ("adamw", "group_mean")
    with refused(r"reward_weights was given as \('1,x',\)"):
        parse("train", COMMANDS["train"], ["--reward-weights", "1,x"])


def test_layers_of_settings_cover_each_other_and_say_where_each_value_comes_from():
    usual = {"steps": 5, "rate": 0.1, "every": None}
    options = {"steps": None, "rate": 0.0, "seed": None}  # 0 is given, None is not
    values, origins = lay(("default", usual), ("given", options), ("budget", {"every": 3}))
    assert values == {"steps": 5, "rate": 0.0, "every": 3, "seed": None}
    assert origins == {"steps": "default", "rate": "given", "every": "budget"}
