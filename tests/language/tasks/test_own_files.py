"""Files as other programs write them: encodings, lines above the header, decimal commas. Read, or refused in words."""

from __future__ import annotations

import csv
import json
import re
import subprocess
from pathlib import Path

import pandas
import pytest
from refusals import refused

from tokenrl.language.rewards.library import NumericAnswer
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.sources import read_splits
from tokenrl.language.tasks.task import load_task

pytestmark = pytest.mark.usefixtures("alone")

ROWS = [{"prompt": "Wie heißt Österreich?", "answer": "Ü"}, {"prompt": "b", "answer": None}]
WRITTEN = {
    "a.csv": "prompt,answer\r\nWie heißt Österreich?,Ü\r\nb,\r\n",
    "b.csv": "prompt\tanswer\nWie heißt Österreich?\tÜ\nb\t\n",
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    "a.ndjson": "".join(json.dumps(row) + "\n" for row in ROWS),
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be"])
def test_marks_say_how_a_file_is_encoded_alone_and_in_a_folder(name, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    Path("folder").mkdir()
    for path in (name, f"folder/{name}"):
        Path(path).write_bytes((mark + WRITTEN[name]).encode(encoding))
        assert read_splits(path.partition("/")[0])["train"] == ROWS


def in_shell(pattern, caught, file, new):
    """Run the command that a refusal gives."""
    command = re.search(pattern, str(caught.value))[0].replace("FILE", file).replace("NEW", new)
    subprocess.run(command, shell=True, check=True)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_latin_1_is_never_guessed_and_what_the_refusal_says_converts_it(name):
    Path(name).write_bytes(WRITTEN[name].encode("cp1252"))
    with refused(f"Line . of {name} is no UTF-8.* there stands '.*Wie heiß'") as caught:
        read_splits(name)
    in_shell(r"iconv .*?(?=, or)", caught, name, f"new_{name}")
    assert read_splits(f"new_{name}")["train"] == ROWS
    Path(f"new_{name}").unlink()
    program = re.search(r"from Python (Path.*?'utf-8'\))", str(caught.value))[1]
    exec(program, {"Path": Path, "FILE": name, "NEW": f"new_{name}"})
    assert read_splits(f"new_{name}")["train"] == ROWS


BANK = """Datum;Zweck;Betrag
02.01.2026;Miete;-850,00
05.01.2026;Markt;-42,17
"""
ABOVE = {
    "other cells": "Konto;DE12\nZeitraum;Januar\n",
    "one cell": "Kontoauszug\n\n",
    "empty cells": "Konto;;\nZeitraum;Januar;\n",
}


@pytest.mark.parametrize("above", ABOVE)
def test_lines_above_the_header_are_refused_and_what_the_refusal_says_leaves_them_out(above):
    Path("a.csv").write_text(ABOVE[above] + BANK)
    with refused("a.csv .*If lines stand above the one that names the columns") as caught:
        read_splits("a.csv")
    in_shell("tail .*?NEW", caught, "a.csv", "b.csv")
    rows = [*csv.DictReader(BANK.splitlines(), delimiter=";")]
    assert read_splits("b.csv")["train"] == rows
    expression = re.search(r"task=(pandas.*\))", str(caught.value))[1]
    assert memory_splits(eval(expression, {"pandas": pandas, "FILE": "a.csv"}))["train"] == rows


def test_a_header_without_the_column_is_refused_with_what_stands_in_the_first_line():
    Path("a.csv").write_text("Kontoauszug\n" + BANK.replace(",", "."))
    words = "no column 'Zweck'. Available: Kontoauszug.* In CSV the first line names the columns"
    with refused(words):
        load_task("a.csv", reward=len, prompt_column="Zweck")


def test_cells_with_decimal_commas_stay_texts_which_are_no_numbers():
    Path("a.csv").write_text(
        "prompt;answer\na;3,14\nb;1.234,56\nc;-4,5\nd;1,234.56\ne;1.234\nf;7\n"
    )
    answers = read_splits("a.csv")["train"].columns["answer"]
    assert answers == ["3,14", "1.234,56", "-4,5", "1,234.56", "1.234", "7"]
    completions = ["3.14", "1234.56", "-4.5", "1234.56", "1.234", "7.0"]
    assert NumericAnswer()(completions, answer=answers) == [None, None, None, 1, 1, 1]
