"""What a field that may name code of the user owes follows from its type, so that a new one cannot be forgotten."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import pytest
from refusals import refused
from test_house import PACKAGE_SOURCES, Source

from tokenrl.configuration import check_code, note_code, values_of_code
from tokenrl.control.arguments import ControlArguments
from tokenrl.core.axes import Axes
from tokenrl.flags import described_fields
from tokenrl.language.commands.arguments import EvaluateArguments, SampleArguments
from tokenrl.language.preferences.arguments import RewardModelArguments
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.names import NamesCode
from tokenrl.runs.origin import held_values
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


def fields_of(kind) -> set[str]:
    return {name for name, *_ in values_of_code(kind, {})}


@pytest.mark.parametrize(
    "stored", [{"judges": ["run/evil.py:f"]}, {"rules": {"rule": "run/evil.py:f"}}]
)
def test_a_stranger_s_code_in_a_new_field_is_refused_unless_one_has_trained_with_it(
    stored, workplace, monkeypatch
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(workplace / "settings"))
    for folder in ("run", "theirs"):
        Path(folder).mkdir()
    Path("run/evil.py").write_text("")
    with refused(r"names code that is not executed: (judges|rules.rule) 'run/evil.py:f' is looked"):
        check_code(MadeUp, stored, "run", stored, trusted=False)
    check_code(MadeUp, stored, "run", stored, [*stored], trusted=False)  # the user gave it
    note_code(MadeUp, stored)
    check_code(MadeUp, stored, "theirs", stored, trusted=False)
    Path("run/evil.py").write_text("changed = True")
    with refused("or it has changed since"):
        check_code(MadeUp, stored, "theirs", stored, trusted=False)


def judge(scale):
    return lambda completions: [scale for _ in completions]


class Judge:
    def __init__(self, scale):
        self.scale, self.seen = scale, []

    def __call__(self, completions):
        self.seen += completions
        return [self.scale for _ in completions]


JUDGES = {
    "closure": judge,
    "default": lambda scale: lambda completions, factor=scale: [factor for _ in completions],
    "partial": lambda scale: partial(max, scale),
    "keyword": lambda scale: partial(max, default=scale),
    "object": Judge,
    "bound method": lambda scale: Judge(scale).__call__,
    "partial of an object": lambda scale: partial(Judge(scale), []),
}


@pytest.mark.parametrize("make", JUDGES.values(), ids=JUDGES)
def test_changed_code_in_a_new_field_is_refused_and_stands_among_the_hashes(make):
    def provenance(judge, rule):
        made_up = MadeUp(judges=[judge], rules=Rules(rule))
        made = Provenance(settings=vars(made_up))
        made.take_code(MadeUp)
        return made

    state = provenance(make(1.0), make(1.0)).state_dict()
    assert {"judges", "rules.rule"} <= {name.partition(" ")[0] for name in state["code"]}
    provenance(make(1.0), make(1.0)).load_state_dict(state)
    for name, judges in (("judges", (2.0, 1.0)), ("rules.rule", (1.0, 2.0))):
        with refused(rf"otherwise: {name} \S+ (scale|defaults|args|default): '.*Continue"):
            provenance(*map(make, judges)).load_state_dict(state)


class Stateful(Judge):
    def state_dict(self):
        return vars(self)


def test_what_changes_during_a_run_is_state_and_so_is_what_has_a_state_dict():
    def values():
        return {name.partition(" ")[2] for name in made.state_dict()["code"] if "Judge " in name}

    judge = Judge(1.0)
    made = Provenance(settings={"judges": [judge, Stateful(1.0)]})
    made.take_code(MadeUp)
    before = values()
    judge(["a"])
    assert {name.rpartition(" ")[2] for name in before - values()} == {"seen"} and values()
    assert held_values({"reward": Stateful(1.0)}) == {}


@pytest.mark.parametrize("kind", [*READ, Axes], ids=lambda kind: kind.__name__)
def test_a_field_whose_help_speaks_of_files_with_code_has_the_type(kind):
    texts = {field.name: text for _, field, text in described_fields(kind)}
    speaking = {name for name, text in texts.items() if "module:" in text or ".py:" in text}
    assert speaking <= fields_of(kind)


def lists_of_fields(source: Source) -> list[ast.AST]:
    """Collections in a file that name three or more fields that may name code."""
    names = {name.rpartition(".")[2] for kind in READ for name in fields_of(kind)}
    found = []
    for node in source.nodes:
        items = getattr(node, "elts", None) or getattr(node, "keys", None) or []
        if len(names & {item.value for item in items if isinstance(item, ast.Constant)}) > 2:
            found.append(node)
    return found


def test_no_file_lists_the_fields_by_hand():
    assert [s.module for s in PACKAGE_SOURCES if lists_of_fields(s)] == []
    assert lists_of_fields(Source("x", "x = ('task', 'env', 'reward')"))
    assert lists_of_fields(Source("x", "x = {'task': 1, 'reward': 2, 'generator': 3}"))
