"""Names in docstrings and comments are those of the code: what is renamed takes them along."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from importlib.util import find_spec
from pkgutil import resolve_name

from test_house import (
    DOCUMENTS,
    PACKAGE_SOURCES,
    RECIPE_SOURCES,
    ROOT,
    TEST_SOURCES,
    TOY_SOURCES,
    Source,
)

PACKAGE = PACKAGE_SOURCES + TOY_SOURCES
TESTS = [source for source in TEST_SOURCES if not source.module.startswith("tests.house")]
SOURCES = PACKAGE + RECIPE_SOURCES + TESTS
MADE_UP = {
    "package.module",
    "estimator.AXIS",
    "function.binary",
    "shape.length",
    "words.jsonl",
    "evil.py",
}
"""Names that stand for those that a reader chooses."""
OF_LIBRARIES = {"trainer_state.epoch", "trainer_state.global_step", "trainer_state.max_steps"}
OF_LIBRARIES |= {"vllm.LLM", "DatasetDict", "q_proj", "batch_select_indices"}
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


def owned(source: Source) -> Iterator[str]:
    """Yield what a file defines or reads as `owner.name`, of its module, classes and variables."""
    module = source.module.rpartition(".")[2]
    for node in source.nodes:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}"
        if isinstance(node, ast.Name):
            yield f"{module}.{node.id}"
        if isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else ""
            yield f"{getattr(node.value, 'id', owner)}.{node.attr}"
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                yield from (f"{node.name}.{name}" for name in identifiers(inner))


def identifiers(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node of the code holds, as `rows` in `rows.take`."""
    for field in ("name", "id", "attr", "arg", "asname"):
        if isinstance(name := getattr(node, field, None), str):
            yield from name.split(".")


def words(source: Source) -> set[str]:
    """Return all names in the code of a file, and the words of its strings that are no docstrings."""
    docstrings = {id(n.value) for n in source.nodes if isinstance(n, ast.Expr)}
    found = {name for node in source.nodes for name in identifiers(node)}
    for node in source.nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set() if id(node) in docstrings else set(re.findall(r"\w+", node.value))
    return found


OWNED = {name for source in SOURCES for name in owned(source)}
WORDS = {name for source in SOURCES for name in words(source)}
MODULES = {source.module for source in SOURCES}
FILES = {path.name for path in ROOT.glob("*/**/*.*") if ".venv" not in path.parts}


def exists(name: str) -> bool:
    """Return whether a name with dots is one of the code, of a file or of a library."""
    last_two = ".".join(name.split(".")[-2:])
    if last_two in OWNED | FILES | MADE_UP | OF_LIBRARIES or FORMULA.fullmatch(name):
        return True
    if any(module == name or module.endswith(f".{name}") for module in MODULES):
        return True
    if find_spec(name.split(".")[0]) is None:
        return False
    try:
        return resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


def missing(source: Source) -> list[str]:
    """Return the names in a file's docstrings and comments that are names of nothing."""
    own = words(source)
    names = []
    for name in [name for text in texts(source) for name in NAME.findall(text)]:
        if "." in name:
            names += [name] * (not exists(name))
        elif name[0] == "_" and name[:2] != "__":
            names += [name] * (name not in own)
        elif "_" in name.strip("_") or re.match(r"[A-Z]\w*[a-z]\w*[A-Z]", name):
            known = name in WORDS | OF_LIBRARIES or FORMULA.fullmatch(name)
            names += [name] * (not known)
    return names


def paths_in(text: str) -> set[str]:
    """Return the paths of Python files in a text, if they lie in a folder of this repository."""
    folders = "tokenrl|toy_tasks|recipes|tests|core|runs|language|lab|control"
    return set(re.findall(rf"(?<![\w./-])((?:{folders})/[\w/]+\.py)\b", text))


def test_names_in_docstrings_and_comments_are_names_of_the_code():
    assert {s.module: missing(s) for s in PACKAGE + TESTS if missing(s)} == {}
    gone = ["`targets.OBJECTIVES`", "`_weighted(rows)`", "`made_up_name`", "`MadeUp`"]
    assert [len(missing(Source("x", f"# see {name}"))) for name in gone] == [1] * 4
    there = "`choices.OBJECTIVES`, `torch.nn.Module`, `_f`, `judge_scores`, `s_t`, `errors.py`"
    assert missing(Source("x", f"# see {there}\n_f = 1")) == []


def test_paths_in_docstrings_and_comments_exist():
    named = {path for source in SOURCES for text in texts(source) for path in paths_in(text)}
    files = [str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*.py")]
    assert named and [p for p in named if not any(f.endswith(p) for f in files)] == []


def test_names_of_the_package_in_the_pages_exist():
    pages = [page for page in DOCUMENTS if page.name != "CHANGELOG.md"]
    pattern = re.compile(r"\b((?:tokenrl|toy_tasks)(?:\.[A-Za-z_]\w*)+)\b")
    named = {name for page in pages for name in pattern.findall(page.read_text())}
    assert len(named) > 10
    assert sorted(name for name in named if not exists(name)) == []
