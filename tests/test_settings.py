"""What a setting may be: one sentence for every command and field; settings from keywords and files."""

from __future__ import annotations

import json
import math
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from tokenrl.cli import COMMANDS, main
from tokenrl.configuration import configured
from tokenrl.control.arguments import ControlArguments, ControlSettings
from tokenrl.core import Estimator
from tokenrl.errors import Refused
from tokenrl.language.preferences.arguments import RewardModelArguments, RewardModelSettings
from tokenrl.language.training.arguments import SftArguments, SftSettings, TrainArguments, TrainSettings
from tokenrl.settings import (
    Bounds,
    Count,
    Positive,
    Settings,
    arguments,
    check_choice,
    check_number,
    field_types,
    settled,
    shown,
    written,
)

KINDS = [*{command.arguments for command in COMMANDS.values()}, Estimator]


def numbers(hint: Any, bounds: Bounds = Bounds()) -> list[tuple[type, Bounds]]:  # noqa: B008
    """The kinds of number that a type allows, and the bounds of each, whatever they are wrapped in."""
    if get_origin(hint) is Annotated:
        hint, *metadata = get_args(hint)
        return numbers(hint, next((m for m in metadata if isinstance(m, Bounds)), bounds))
    if hint in (int, float):
        return [(hint, bounds)]
    wrapped = get_origin(hint) in (typing.Union, UnionType, tuple)
    return [found for part in get_args(hint) if wrapped for found in numbers(part)]


def every_number() -> list[tuple[type[Any], str, Any, type, Bounds]]:
    """Each number of all settings: the settings, its name and type, the kind of number, its bounds."""
    found = []
    for kind in sorted(KINDS, key=lambda kind: kind.__name__):
        hints = typing.get_type_hints(kind, include_extras=True)
        found += [(kind, f.name, hints[f.name], *one) for f in fields(kind) for one in numbers(hints[f.name])]
    return found


def just_outside(number: type, bounds: Bounds) -> list[tuple[float, str]]:
    """A value beyond each bound, as near as can be, and the words for the bound."""
    return [
        (
            limit + shift if number is int else math.nextafter(limit, shift * math.inf),
            f"{words} {written(limit)}",
        )
        for words, limit, shift in (
            ("at least", bounds.at_least, -1),
            ("above", bounds.above, -1),
            ("at most", bounds.at_most, 1),
            ("below", bounds.below, 1),
        )
        if limit is not None
    ]


@pytest.mark.parametrize(
    ("kind", "name", "hint", "number", "bounds"),
    [pytest.param(*one, id=f"{one[0].__name__}.{one[1]}") for one in every_number()],
)
def test_every_number_of_all_settings_is_refused_outside_its_bounds(kind, name, hint, number, bounds):
    whole = "a whole number" if number is int else "a finite number"
    wrong: list[tuple[Any, str]] = [(True, whole), ("3", whole), (math.nan, whole), (math.inf, whole)]
    wrong += [(1.5, whole)] if number is int else []
    wrong += [(10**400, whole), (-(10**400), whole), ([], whole), ({}, whole)]
    for value, words in [*wrong, *just_outside(number, bounds)]:
        given = (value, value) if "tuple" in str(hint) else value
        with pytest.raises(Refused) as error:
            kind(**{name: given})
        said = str(error.value)
        assert said.startswith(f"{name} was given as {shown(given)}; it must be "), said
        assert len(said) < 400
        assert whole in said and words in said and "\n" not in said and error.value.exit_code == 2


def test_every_number_of_all_settings_has_bounds_on_both_sides():
    for kind, name, _, _, bounds in every_number():
        low, high = (bounds.at_least, bounds.above), (bounds.at_most, bounds.below)
        assert low != (None, None) and high != (None, None), (kind.__name__, name)


def test_every_seed_of_all_settings_has_the_same_bounds():
    seeds = [(name, bounds) for _, name, _, _, bounds in every_number() if name.endswith("seed")]
    assert len(seeds) > 8 and {bounds for _, bounds in seeds} == {Bounds(at_least=0, at_most=2**32 - 1)}


def every_text() -> list[Any]:
    """Each text of all settings that takes no object, and each estimator: the settings and the name."""
    found = []
    for kind in sorted(KINDS, key=lambda kind: kind.__name__):
        for name, hint in typing.get_type_hints(kind, include_extras=True).items():
            if name == "estimator" or ("str" in str(hint) and "or an object" not in str(hint)):
                found.append(pytest.param(kind, name, id=f"{kind.__name__}.{name}"))
    return found


@pytest.mark.parametrize(("kind", "name"), every_text())
@pytest.mark.parametrize("given", [5, {"a": 1}, [3], [["a"]], True, 1.5], ids=str)
def test_what_is_no_text_is_refused_for_every_text_of_all_settings(kind, name, given):
    others = {"run_dir": (), "what": "exact"}  # without a default
    needed = {other: value for other, value in others.items() if other in field_types(kind)}
    if name == "chat_template_kwargs" and given == {"a": 1}:  # from Python this is a dict
        assert getattr(arguments(kind, needed | {name: given}), name) == '{"a": 1}'
        return
    with pytest.raises(Refused) as error:
        arguments(kind, needed | {name: given})
    assert name in str(error.value) or name == "estimator", error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "command", [name for name, one in COMMANDS.items() if hasattr(one.arguments, "seed")]
)
def test_every_command_refuses_a_number_in_the_same_sentence(command, capsys):
    assert main([*command.split(), "--seed", "-1"]) == 2
    error = capsys.readouterr().err
    words = "a whole number of at least 0 and at most 4,294,967,295"
    assert error == f"tokenrl: seed was given as -1; it must be {words}.\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--learning-rate 1e-5x", "--learning-rate was given as '1e-5x'; it must be a finite number above 0"),
        ("--seed nine", "--seed was given as 'nine'; it must be a whole number of at least 0"),
        ("--lr-scheduler-type linea", "given as 'linea'. Did you mean 'linear'? It must be one of constant,"),
        ("--estimator.scale-ddof 3", "--estimator.scale-ddof was given as '3'; it must be one of 0, 1."),
        ("--estimator grppo", "preset was given as 'grppo'. Did you mean 'grpo'? It must be one of"),
        ("--lerning-rate 3", "Unrecognized options: --lerning-rate, 3. Did you mean --learning-rate?"),
        ("--max-steps", "Missing value for argument '--max-steps'"),
        ("extra", "Unrecognized options: extra. See tokenrl train --help."),
    ],
)
def test_what_the_parser_refuses_is_said_in_one_paragraph_too(words, said, capsys):
    assert main(["train", *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenrl: ") and said in error and error.count("\n") == 1
    assert "│" not in error and "Annotated" not in error


def test_an_axis_is_refused_on_the_command_line_in_the_same_sentence(capsys):
    for command in ("train", "control"):
        assert main([command, "--estimator.epsilon", "1.5"]) == 2
        words = "epsilon was given as 1.5; it must be a finite number above 0 and at most 1."
        assert capsys.readouterr().err == f"tokenrl: {words}\n"


@dataclass(frozen=True)
class Sample(Settings):
    """A class with every sort of field."""

    count: Count = 1
    rate: Positive | None = None
    share: Annotated[float, Bounds(at_least=0, below=1)] = 0.5
    shade: Literal["light", "dark", "none"] | None = None
    on: bool = False
    sizes: tuple[Count, ...] = (1,)
    span: tuple[float, float] | None = None
    words: tuple[str, ...] = ()
    place: str = "here"
    estimator: Estimator = Estimator()  # noqa: RUF009


MOST = " and at most 1,000,000,000"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 0}, f"count was given as 0; it must be a whole number of at least 1{MOST}."),
        ({"count": 2.0}, f"count was given as 2.0; it must be a whole number of at least 1{MOST}."),
        ({"count": None}, f"count was given as None; it must be a whole number of at least 1{MOST}."),
        ({"rate": 0}, "rate was given as 0; it must be a finite number above 0 and at most 1e+30, or None."),
        ({"share": 1}, "share was given as 1; it must be a finite number of at least 0 and below 1."),
        (
            {"shade": "drak"},
            "shade was given as 'drak'. Did you mean 'dark'? It must be one of light, dark, none, or None.",
        ),
        ({"on": "yes"}, "on was given as 'yes'; it must be True or False."),
        (
            {"sizes": (1, 0)},
            f"sizes was given as (1, 0); it must be values, each a whole number of at least 1{MOST}.",
        ),
        ({"sizes": 3}, f"sizes was given as 3; it must be values, each a whole number of at least 1{MOST}."),
        ({"span": (1.0,)}, "span was given as (1.0,); it must be 2 values, each a finite number, or None."),
    ],
    ids=str,
)
def test_one_form_of_sentence(changes, said):
    with pytest.raises(Refused) as error:
        Sample(**changes)
    assert str(error.value) == said


def test_what_is_allowed_passes():
    import numpy as np

    Sample(count=np.int64(3), rate=np.float32(0.5), share=0, shade=None, on=True, sizes=[4, 5], span=(0, 1))
    assert Estimator(baseline=max).baseline is max  # from Python a function stands for a name
    with pytest.raises(Refused, match="scale was given as <built-in function max>"):
        Estimator(scale=max)


def test_checks_for_what_is_no_dataclass_say_the_same():
    check_number("slip", 0.5, at_least=0, at_most=1)
    with pytest.raises(
        Refused, match=r"^slip was given as 2; it must be a finite number of at least 0 and at"
    ):
        check_number("slip", 2, at_least=0, at_most=1)
    with pytest.raises(
        Refused, match=r"^head was given as 'gauss'. Did you mean 'gaussian'\? It must be one of a, "
    ):
        check_choice("head", "gauss", ["a", "gaussian"])


def test_arguments_are_made_of_keywords():
    made = arguments(Sample, {"words": "one", "sizes": [2, 3], "place": Path("a") / "b", "estimator": "grpo"})
    assert made == Sample(
        words=("one",), sizes=(2, 3), place=str(Path("a") / "b"), estimator=Estimator.preset("grpo")
    )
    assert arguments(Sample, {"words": None, "span": None}) == Sample()
    assert arguments(Sample, {"estimator": {"beta": 0.5}}).estimator == Estimator(beta=0.5)
    for options, said in (
        ({"cuont": 2}, "There is no setting 'cuont'. Did you mean 'count'? Available: count, "),
        ({"estimator": {"betta": 1}}, "There is no setting 'betta'. Did you mean 'beta'?"),
        (
            {"estimator": "grop"},
            "preset was given as 'grop'. Did you mean 'grpo'? It must be one of reinforce, ",
        ),
    ):
        with pytest.raises(Refused) as error:
            arguments(Sample, options)
        assert str(error.value).startswith(said)


def test_resolved_settings_leave_nothing_open():
    for open_ones, kind in (
        (TrainArguments(), TrainSettings),
        (SftArguments(), SftSettings),
        (RewardModelArguments(), RewardModelSettings),
        (ControlArguments(head="softmax"), ControlSettings),
    ):
        with pytest.raises(Refused, match="was given as None; it must be "):
            settled(kind, open_ones, {})
    found = {"value_learning_rate": 0.1, "eval_every": 4, "seed": 8}
    made = settled(ControlSettings, ControlArguments(head="softmax", eval_every=0), found)
    assert (made.value_learning_rate, made.eval_every, made.seed) == (0.1, 0, 0)
    with pytest.raises(Refused, match="head was given as 'auto'; it must be one of softmax, gaussian"):
        settled(ControlSettings, ControlArguments(), found)


YAML = """
# a comment
task: vowels
learning_rate: 1e-3
weight_decay: 2.5E-2
max_steps: 3
reward: [exact_match, repetition]
estimator:
  baseline: group_mean
  scale_eps: 1e-6
stop: [a, b]
micro_batch_size: null
"""


def test_a_file_of_settings_is_json_or_yaml(tmp_path):
    expected = TrainArguments(
        task="vowels",
        learning_rate=1e-3,
        weight_decay=2.5e-2,
        max_steps=3,
        reward=("exact_match", "repetition"),
        estimator=Estimator(baseline="group_mean", scale_eps=1e-6),
        stop=("a", "b"),
    )
    recorded = {
        "kind": "train",
        "versions": {"torch": "2"},
        "title": "t",
        "solved": 0.9,
        "command": "tokenrl",
    }
    values = {
        "task": "vowels", "learning_rate": 1e-3, "weight_decay": 2.5e-2, "max_steps": 3,
        "reward": ["exact_match", "repetition"], "stop": ["a", "b"], "micro_batch_size": None,
        "estimator": {"baseline": "group_mean", "scale_eps": 1e-6},
    }  # fmt: skip
    for name, text in {
        "settings.yaml": YAML,
        "settings.yml": YAML,
        "settings.json": json.dumps(values),
        "config.json": json.dumps(values | recorded),
    }.items():
        (tmp_path / name).write_text(text)
        assert configured(TrainArguments, tmp_path / name, "train") == expected, name
    assert configured(TrainArguments, tmp_path, "train") == expected  # the config.json of a run
    (tmp_path / "preset.yaml").write_text("estimator: grpo")
    assert configured(TrainArguments, tmp_path / "preset.yaml", "train").estimator == Estimator.preset("grpo")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", '{"max_step": 3}', "There is no setting 'max_step'. Did you mean 'max_steps'?"),
        ("a.yaml", "estimator: {betta: 3}", "There is no setting 'betta'. Did you mean 'beta'?"),
        ("a.yaml", "max_steps: 0", "max_steps was given as 0; it must be a whole number of at least 1"),
        ("a.yaml", "max_steps: [1", "cannot be read"),
        ("a.yaml", "- 1", "is a list; it must map names to values"),
        ("a.json", "{", "cannot be read"),
        ("a.json", "3", "is a int; it must map names to values"),
        ("a.json", '{"kind": "control"}', "is for `tokenrl control`; give it to that command"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(Refused) as error:
        configured(TrainArguments, tmp_path / name, "train")
    assert said in str(error.value) and str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
