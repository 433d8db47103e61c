"""The tables of the pages: each is whole, and those that are written by hand say what the code says."""

from __future__ import annotations

import re

import pytest
from folders import RECIPES, ROOT

from tokenrl.cli import COMMANDS, main
from tokenrl.errors import TokenrlError
from tokenrl.lab.compare.loop import UNMET
from tokenrl.runs.output import UNREAD
from tokenrl.runs.resume import FREE, ROUNDING
from tokenrl.runs.signals import SIGNALS

PAGES = RECIPES / "pages"
FILES = [*sorted(ROOT.glob("*.md")), *sorted(RECIPES.rglob("*.md"))]


def cells(line: str) -> list[str]:
    return re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|"))


def tables(text: str) -> list[list[str]]:
    """The lines of each table: lines one below the other that begin with a stroke, outside of code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return [block.splitlines() for block in re.findall(r"(?:^ *\|.*\n?)+", text, re.MULTILINE)]


def faults(text: str) -> list[str]:
    """The first line of each table without a head, without a line below it, or with rows of unequal lengths."""
    wrong = []
    for lines in tables(text):
        has_head = len(lines) > 2 and all(re.fullmatch(" *:?-+:? *", x) for x in cells(lines[1]))
        if not has_head or len({len(cells(line)) for line in lines}) > 1:
            wrong.append(lines[0])
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_table_is_whole(path):
    assert faults(path.read_text(encoding="utf-8")) == []


def test_a_blank_line_in_a_table_and_a_missing_cell_are_seen():
    whole = "| a | b |\n|---|---|\n| 1 \\| 2 | 3 |\n| 4 | 5 |\n"
    assert faults(whole) == [] == faults(f"```\n| no table |\n```\n{whole}")
    assert faults(whole.replace("| 4", "\n| 4")) == ["| 4 | 5 |"]
    assert faults(whole.replace(" | 5", "")) == ["| a | b |"]


def rows_below(page: str, heading: str) -> dict[str, list[str]]:
    """The cells of the tables below a heading of a page, by the first cell of their rows."""
    section = (PAGES / page).read_text(encoding="utf-8").partition(f"## {heading}\n")[2]
    lines = [line for table in tables(section.partition("\n## ")[0]) for line in table[2:]]
    return {name.strip(): rest for name, *rest in map(cells, lines)}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_flags_of_the_reference_are_flags_of_the_command(name, capsys):
    page = (PAGES / "reference" / f"{name.replace(' ', '_')}.md").read_text(encoding="utf-8")
    flags = {*re.findall(r"^\| `(--[a-z-]+)`", page, re.MULTILINE)}
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    assert flags and flags <= {*re.findall(r"--[a-z-]+", capsys.readouterr().out)}


def test_every_exit_code_is_in_the_list():
    codes = {
        int(x)
        for x in re.findall(
            r"\d+", " ".join(rows_below("reference/run_directory.md", "Exit codes"))
        )
    }
    raised = {kind.exit_code for kind in TokenrlError.__subclasses__() if "exit_code" in vars(kind)}
    assert codes == {0, UNMET, UNREAD, *raised, *SIGNALS}


def test_the_settings_that_may_change_are_those_that_a_continuation_accepts():
    rows = {
        what: {flag.replace("-", "_") for flag in re.findall("`--([a-z-]+)`", names)}
        for what, (names,) in rows_below("guides/resume.md", "What may change").items()
    }
    rounding = {what for what in rows if what.startswith("rounding")}
    assert set.union(*(rows[what] for what in rounding)) == ROUNDING
    assert set.union(*(rows[what] for what in rows.keys() - rounding)) == FREE
