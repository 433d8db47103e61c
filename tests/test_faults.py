"""The table of faults names a test for each, and the tests exist."""

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROWS = re.findall(
    r"^\| (\d+) \|.*\| (`.*`) \|$", (HERE / "faults.md").read_text(encoding="utf-8"), re.M
)


def test_all_faults_are_in_the_table():
    assert [int(number) for number, _ in ROWS] == list(range(1, len(ROWS) + 1))


@pytest.mark.parametrize(("number", "tests"), ROWS)
def test_the_tests_of_a_fault_exist(number, tests):
    for name in tests.split():
        file, _, test = name.strip("`").partition("::")
        assert f"def {test}(" in (HERE.parent / file).read_text(encoding="utf-8"), name


def test_the_functions_at_which_runs_are_signalled_exist():
    places = (HERE / "resume" / "test_signalled.py").read_text(encoding="utf-8")
    functions = re.findall(r'\("([\w/]+\.py):(\w+)", \d+\)', places)
    assert len(functions) > 10
    for file, name in functions:
        assert f"def {name}(" in (HERE.parent / "tokenrl" / file).read_text(encoding="utf-8"), (
            file,
            name,
        )
