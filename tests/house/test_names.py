"""Names in docstrings, comments and pages are those of the code: what is renamed takes them along."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pkgutil import resolve_name

import pytest
from test_house import (
    DOCUMENTS,
    PACKAGE_SOURCES,
    RECIPE_SOURCES,
    ROOT,
    TEST_SOURCES,
    TOY_SOURCES,
    Source,
)

TESTS = [source for source in TEST_SOURCES if not source.module.startswith("tests.house")]
CHECKED = PACKAGE_SOURCES + TOY_SOURCES + TESTS
SOURCES = CHECKED + RECIPE_SOURCES
OTHERS = {"AXIS", "evil", "py", "DatasetDict", "LLM", "q_proj", "batch_select_indices"}
"""Parts of names that a reader chooses, and of names of libraries that the code does not use."""
FORMULA = re.compile(r"(KL|\w|z\.s)_\w")
NAME = re.compile(r"`([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(?:\(.*?\))?`")


def texts(source: Source) -> Iterator[str]:
    """Yield the docstrings and comments of a file."""
    for node in source.nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@cache
def words(source: Source) -> set[str]:
    """Return the words of a file's code, of its strings too, without its docstrings and comments."""
    found = set(source.module.split("."))
    docstrings = {id(node.value) for node in source.nodes if isinstance(node, ast.Expr)}
    for node in source.nodes:
        for field in ("name", "id", "attr", "arg", "asname", "module", "value"):
            value = getattr(node, field, None)
            if isinstance(value, str) and id(node) not in docstrings:
                found |= {*re.findall(r"\w+", value)}
    return found


FOLDERS = ("tokenrl", "toy_tasks", "recipes", "tests")
FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")]
WORDS = OTHERS | {part for path in FILES for part in path.name.split(".")}
WORDS |= {name for source in SOURCES for name in words(source)}


def missing(source: Source) -> list[str]:
    """Return the names in a file's docstrings and comments of which a part is no word of the code."""
    own = words(source)
    names = []
    for name in NAME.findall("\n".join(texts(source))):
        if name.startswith("__") or FORMULA.fullmatch(name):
            continue
        known = own if name.startswith("_") else WORDS
        is_name = re.search(r"[._]|^[A-Z]\w*[a-z]\w*[A-Z]", name)
        names += [name] * bool(is_name and {*name.split(".")} - known)
    return names


def test_names_in_docstrings_and_comments_are_names_of_the_code():
    assert {s.module: missing(s) for s in CHECKED if missing(s)} == {}
    paths = re.compile(r"(?<![\w./-])((?:tokenrl|toy_tasks|recipes|tests|core|runs)/[\w/]+\.py)\b")
    named = {path for source in SOURCES for text in texts(source) for path in paths.findall(text)}
    assert named and [p for p in named if not any(str(f).endswith(p) for f in FILES)] == []


@pytest.mark.parametrize("name", ["choices.OBJECTIFS", "_weighted(rows)", "made_up_name", "MadeUp"])
def test_the_rule_notices(name):
    assert len(missing(Source("x", f"# see `{name}`"))) == 1
    assert missing(Source("x", "# see `choices.OBJECTIVES`, `_f` and `s_t`\n_f = 1")) == []


def test_names_of_the_package_in_the_pages_exist():
    pages = [page for page in DOCUMENTS if page.name != "CHANGELOG.md"]
    pattern = re.compile(r"\b((?:tokenrl|toy_tasks)(?:\.[A-Za-z_]\w*)+)\b")
    named = {name for page in pages for name in pattern.findall(page.read_text())}
    assert len(named) > 10
    for name in named - {path.name for path in FILES}:
        assert resolve_name(name) is not None, name
