"""The tables of the pages: each is whole, and those that are written by hand say what the code says."""

from __future__ import annotations

import re

import pytest
from folders import RECIPES, ROOT
from pages import section

from tokenrl.errors import TokenrlError
from tokenrl.lab.compare.judgement import UNMET
from tokenrl.runs.output import UNREAD
from tokenrl.runs.resume import FREE, ROUNDING
from tokenrl.runs.signals import SIGNALS

PAGES = RECIPES / "pages"


def tables(text):
    """The lines of each table: lines one below the other that begin with a stroke, outside of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [block.splitlines() for block in re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)]


def faults(text):
    """The head of each table without a line of dashes below it, or with rows of unequal lengths."""
    for head, *rows in tables(text):
        lengths = {len(re.findall(r"(?<!\\)\|", row)) for row in (head, *rows)}
        if len(lengths) > 1 or not rows or not re.fullmatch("[|: -]+", rows[0]):
            yield head


@pytest.mark.parametrize("path", [*ROOT.glob("*.md"), *RECIPES.rglob("*.md")], ids=str)
def test_every_table_is_whole(path):
    assert [*faults(path.read_text(encoding="utf-8"))] == []


def test_a_blank_line_in_a_table_and_a_missing_cell_are_seen():
    whole = "```\n| code |\n```\n| a | b |\n|---|---|\n| 1 \\| 2 | 3 |\n| 4 | 5 |\n"
    assert [*faults(whole)] == []
    assert [*faults(whole.replace("| 4", "\n| 4"))] == ["| 4 | 5 |"]
    assert [*faults(whole.replace(" | 5", ""))] == ["| a | b |"]


def test_every_exit_code_is_in_the_list():
    first_cells = re.findall(
        r"(?m)^\|([^|]*)", section(PAGES / "reference/run_directory.md", "Exit codes")
    )
    kinds = TokenrlError.__subclasses__()
    raised = {kind.exit_code for kind in kinds if "exit_code" in vars(kind)}
    codes = {*map(int, re.findall(r"\d+", " ".join(first_cells)))}
    assert codes == {0, UNMET, UNREAD, *raised, *SIGNALS}


def test_the_settings_that_may_change_are_those_that_a_continuation_accepts():
    table = section(PAGES / "guides/resume.md", "What may change").replace("-", "_")
    free, _, rounding = table.partition("| rounding")
    for names, settings in ((free, FREE), (rounding, ROUNDING)):
        assert {*re.findall(r"`__([a-z_]+)`", names.partition("\n\nA")[0])} >= settings
    assert {*re.findall(r"`__([a-z_]+)`", table)} == FREE | ROUNDING
