"""Advice as a document: tables that GitHub can read, whatever the texts hold."""

from __future__ import annotations

import re

import pytest

from tokenrl.advisor.page import Page, Sheet, markdown
from tokenrl.cli import main

PAGE = Page(
    title="advice: a|b",
    sheets=[
        Sheet("Facts", ("", ""), [("weight |S|^2", "two\nlines, *stars* and `code`")]),
        Sheet("Nothing", ("a", "b"), []),
        Sheet("Settings", ("setting", "value"), [("estimator.entropy_coef", "<none> _x_ a~b [c]")]),
    ],
    lead="Run it",
    command="tokenrl train --prompt-template 'a|b'",
    warnings=["one | two"],
)


def test_a_page_is_a_document_in_which_no_text_is_markup():
    assert markdown(PAGE) == (
        "# advice: a\\|b\n\n"
        "## Facts\n\n"
        "|  |  |\n| --- | --- |\n"
        "| weight \\|S\\|^2 | two lines, \\*stars\\* and \\`code\\` |\n\n"
        "## Settings\n\n"
        "| setting | value |\n| --- | --- |\n"
        "| estimator.entropy_coef | \\<none> \\_x\\_ a\\~b \\[c\\] |\n\n"
        "## Warnings\n\n- one \\| two\n\n"
        "## Run it\n\n```sh\ntokenrl train --prompt-template 'a|b'\n```\n"
    )


def tables(document: str) -> list[list[str]]:
    """The lines of each table."""
    return [block.splitlines() for block in document.split("\n\n") if block.startswith("|")]


def cells(line: str) -> int:
    return len(re.findall(r"(?<!\\)\|", line)) - 1


@pytest.mark.parametrize(
    ("subject", "sections"),
    [
        (["--env", "gridworld"], ["Facts", "Policy heads", "Settings", "Run it"]),
        (
            ["--env", "MountainCar-v0", "--episodes", "2"],
            ["Facts", "Policy heads", "Settings", "Warnings", "Run it"],
        ),
        (["--task", "vowels", "--num-prompts", "4", "--num-samples", "4"], ["Facts", "Settings", "Run it"]),
        (["--run"], ["Facts", "Findings", "Run it again with"]),
    ],
)
def test_all_three_kinds_of_advice_are_written(subject, sections, made_up, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TOKENRL_CACHE", str(tmp_path / "cache"))
    subject = [*subject, str(made_up("train"))] if subject == ["--run"] else subject
    assert main(["advise", *subject, "--markdown", str(tmp_path / "advice.md")]) == 0
    document = (tmp_path / "advice.md").read_text()
    assert document.startswith("# tokenrl advise: ")
    assert re.findall(r"^## (.*)$", document, re.MULTILINE) == sections
    found = tables(document)
    assert len(found) == len(sections) - 1 - ("Warnings" in sections)
    for table in found:
        assert len({cells(line) for line in table}) == 1 and len(table) > 2
    command = capsys.readouterr().out.rpartition(": ")[2].strip()
    assert f"```sh\n{command}\n```\n" in document and command.startswith("tokenrl ")


def test_a_document_that_cannot_be_written_is_refused(capsys):
    assert main(["advise", "--env", "bandit", "--markdown", "nowhere/a.md"]) == 2
    assert "nowhere/a.md cannot be written" in capsys.readouterr().err


def test_two_names_for_two_files(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["advise", "--env", "walk", "--config", "a.json", "--json", "./a.json"]) == 2
    assert "a.json was given twice" in capsys.readouterr().err
    assert main(["advise", "--env", "walk", "--markdown", "."]) == 2
    assert "is a directory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
