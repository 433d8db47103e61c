"""What a field that may name code of the user owes follows from its type, so that a new one cannot be forgotten."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
from refusals import refused
from test_house import PACKAGE_SOURCES, Source

from tokenrl.configuration import TrustArguments, check_code, code_fields, note_code
from tokenrl.control.arguments import ControlArguments
from tokenrl.core.axes import Axes
from tokenrl.flags import described_fields
from tokenrl.language.commands.arguments import EvaluateArguments, SampleArguments
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.names import NamesCode
from tokenrl.runs.resume import Provenance
from tokenrl.settings import OR_FUNCTION, OR_OBJECT, Settings

READ = (TrainArguments, SftArguments, RewardModelArguments, ControlArguments)
READ += (EvaluateArguments, SampleArguments)
"""Settings that may come from the run of somebody else."""


@dataclass(frozen=True)
class Rules(Settings):
    """Made up: settings inside of others."""

    rule: Annotated[str, OR_FUNCTION] = "none"


@dataclass(frozen=True)
class MadeUp(TrainArguments):
    """Made up: settings with two more fields that may name code, of which this package knows nothing else."""

    judges: Annotated[tuple[str, ...], OR_OBJECT, NamesCode()] | None = None
    rules: Rules = field(default_factory=Rules)


NEW = {"judges": ["run/evil.py:judge"], "rules": {"rule": "run/evil.py:rule"}}


def test_a_new_field_is_among_those_that_may_name_code():
    assert {*code_fields(MadeUp)} - {*code_fields(TrainArguments)} == {"judges", "rules.rule"}


@pytest.mark.parametrize("name", ["judges", "rules"])
def test_a_stranger_s_code_in_a_new_field_is_refused_unless_one_has_trained_with_it(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "settings"))
    stored = {name: NEW[name], "versions": {}}
    Path("run").mkdir()
    Path("run/evil.py").write_text("")
    label = next(field for field in code_fields(MadeUp) if field.partition(".")[0] == name)
    with refused(f"names code that is not executed: {label} 'run/evil.py:"):
        check_code(MadeUp, stored, "run", stored, trusted=False)
    check_code(MadeUp, stored, "run", stored, [name], trusted=False)  # the user gave it
    note_code(MadeUp, stored)
    Path("theirs").mkdir()
    check_code(MadeUp, stored, "theirs", stored, trusted=False)
    Path("run/evil.py").write_text("changed = True")
    with refused("or it has changed since"):
        check_code(MadeUp, stored, "theirs", stored, trusted=False)


def judge(scale):
    return lambda completions: [scale for _ in completions]


def with_default(scale):
    return lambda completions, judge_scale=scale: [judge_scale for _ in completions]


def plain_judge(scale, completions):
    return [scale for _ in completions]


class Judge:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, completions):
        return self.judge(completions)

    def judge(self, completions):
        return [self.scale for _ in completions]


JUDGES = {
    "closure": judge,
    "default": with_default,
    "partial": partial(partial, plain_judge),
    "keyword": lambda scale: partial(plain_judge, judge_scale=scale),
    "object": Judge,
    "bound method": lambda scale: Judge(scale).judge,
    "partial of an object": lambda scale: partial(Judge(scale), []),
}


@pytest.mark.parametrize("judge", JUDGES.values(), ids=JUDGES)
@pytest.mark.parametrize("name", ["judges", "rules.rule"])
def test_changed_code_in_a_new_field_is_refused_and_stands_among_the_hashes(name, judge):
    def provenance(function, other):
        made_up = MadeUp(judges=[function], rules=Rules(other))
        made = Provenance(settings=vars(made_up))
        made.take_code(MadeUp)
        return made

    def stays(completions):
        return completions

    def names():
        return [name for name in made.state_dict()["code"] if not name.startswith("module ")]

    pairs = {"judges": (judge(1.0), stays), "rules.rule": (stays, judge(1.0))}
    changed = {"judges": (judge(2.0), stays), "rules.rule": (stays, judge(2.0))}
    made = provenance(*pairs[name])
    provenance(*pairs[name]).load_state_dict(made.state_dict())
    with refused(rf"otherwise: {name} .*(judge|Judge|default)\S*\.(\w*scale|0): "):
        provenance(*changed[name]).load_state_dict(made.state_dict())
    assert {label.partition(" ")[0] for label in names()} == {"judges", "rules.rule"}


@pytest.mark.parametrize("kind", [*READ, Axes], ids=lambda kind: kind.__name__)
def test_a_field_whose_help_speaks_of_files_with_code_has_the_type(kind):
    if kind is not Axes:
        assert issubclass(kind, TrustArguments)
    texts = {field.name: text for _, field, text in described_fields(kind)}
    speaking = {name for name, text in texts.items() if "module:" in text or ".py:" in text}
    speaking -= {"trust_run"}
    assert speaking <= {*code_fields(kind)}
    assert {each.name for each in fields(kind)} >= speaking


def lists_of_fields(source: Source) -> list[list[str]]:
    """Collections of constants in a file that name three or more fields that may name code."""
    names = {name.rpartition(".")[2] for kind in READ for name in code_fields(kind)}
    found = []
    for node in source.nodes:
        items = getattr(node, "elts", None) or getattr(node, "keys", None) or []
        texts = [str(item.value) for item in items if isinstance(item, ast.Constant)]
        if len(names.intersection(texts)) > 2:
            found.append(texts)
    return found


def test_no_file_lists_the_fields_by_hand():
    found = {source.module: lists_of_fields(source) for source in PACKAGE_SOURCES}
    assert {module: lists for module, lists in found.items() if lists} == {}
    for text in ("x = ('task', 'env', 'reward')", "x = {'task': 1, 'reward': 2, 'generator': 3}"):
        assert len(lists_of_fields(Source("x", text))) == 1
