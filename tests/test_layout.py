"""The rules of the house, enforced on the source: who may import whom, sizes, light imports, honest tests."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    *(["errors"], ["user_code"], ["names"], ["foreign"], ["settings"], ["configuration"], ["calls"]),
    *(["core"], ["runs"], ["control", "language"], ["lab"], ["advisor"], ["flags"], ["cli"], ["__main__"]),
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FACADE = len(LAYERS)  # tokenrl/__init__.py, above everything
INSIDE = {  # the folders of a room, from below
    "language": ["policy", "rewards", "tasks", "rollout", "training", "preferences", "inspect"],
    "lab": ["exact", "measure", "compare"],
}
SOURCES = sorted(path for part in ("tokenrl", "toy_tasks", "recipes") for path in (ROOT / part).rglob("*.py"))
RECIPES = [path for path in SOURCES if path.is_relative_to(ROOT / "recipes")]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
NOTEBOOKS = sorted((ROOT / "recipes").rglob("*.ipynb"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.md"), *(ROOT / "docs").rglob("*.md")])


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


text_of = cache(Path.read_text)


@cache
def nodes_of(source: str) -> list[ast.AST]:
    """All nodes of a source, which most of the rules go through."""
    return list(ast.walk(ast.parse(source)))


@pytest.fixture(scope="module", autouse=True)
def forgotten():
    """The nodes are millions of objects, which would make the tests that follow slower."""
    yield
    for cached in (text_of, nodes_of, functions_of):
        cached.cache_clear()


def imports(source: str, module: str, *, package: bool = False) -> Iterator[str]:
    """Full names of what is imported anywhere, in functions and for type checkers too."""
    return imports_among(nodes_of(source), module, package=package)


def imports_among(nodes: Iterable[ast.AST], module: str, *, package: bool = False) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                base = module.split(".")[: len(module.split(".")) - node.level + package]
                start = ".".join([*base, *([start] if start else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def room_of(name: str) -> str:
    """`tokenrl.core.kl` is in the room `core`; what lies in the package itself is in the room ``."""
    part = [*name.split("."), ""][1]
    return part if part in LEVEL else ""


PUBLIC_ROOMS = ("core", "runs", "control", "language", "lab")


def deep_imports(source: str, module: str = "recipes.x") -> list[str]:
    """What is imported from below a room, where only the public names of tokenrl and its rooms should be."""
    allowed = {"tokenrl", *(f"tokenrl.{room}" for room in PUBLIC_ROOMS)}
    found = []
    for node in nodes_of(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokenrl":
            found += [] if node.module in allowed else [node.module]
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names if a.name.split(".")[0] == "tokenrl"]
            found += [name for name in names if name not in allowed]
    return found


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipes_use_public_names_only(path):
    assert deep_imports(text_of(path)) == []


def code_cells(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_documents_use_public_names_only():
    blocks = [b for d in DOCUMENTS for b in re.findall(r"```python\n(.*?)```", d.read_text(), re.DOTALL)]
    blocks += [cell for notebook in NOTEBOOKS for cell in code_cells(notebook)]
    assert blocks
    assert [name for block in blocks for name in deep_imports(block)] == []


def test_the_rule_about_public_names_notices():
    assert deep_imports("from tokenrl.core.kl import k1") == ["tokenrl.core.kl"]
    assert deep_imports("import tokenrl.language.training") == ["tokenrl.language.training"]
    assert deep_imports("import tokenrl\nfrom tokenrl.lab import measure_bias") == []


@pytest.mark.parametrize("room", ["", *PUBLIC_ROOMS])
def test_every_public_name_is_there_and_documented(room):
    package = importlib.import_module("tokenrl" + (f".{room}" if room else ""))
    assert dir(package)
    for name in dir(package):
        value = getattr(package, name)
        if callable(value) or isinstance(value, type(package)):
            assert value.__doc__ and len(value.__doc__) > 30, name
        # Once a module of this name has been imported, Python gives the module in place of the name.
        hidden = {path.stem for path in Path(package.__file__).parent.iterdir()}
        assert name not in hidden, name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'; it has "):
        package.nonsense  # noqa: B018


def folder_level(name: str, room: str) -> int | None:
    """Place of a module's folder in its room, None for what lies in the room itself."""
    folder = [*name.split("."), "", ""][2]
    return INSIDE[room].index(folder) if folder in INSIDE.get(room, []) else None


def forbidden_imports(source: str, module: str, *, package: bool = False) -> list[str]:
    top, room = module.split(".")[0], room_of(module)
    found = []
    for name in imports(source, module, package=package):
        target = name.split(".")[0]
        if target == "recipes":
            found.append(f"{module} imports {name}: recipes are never imported")
        if (top, target) in {("tokenrl", "toy_tasks"), ("toy_tasks", "tokenrl")}:
            found.append(f"{module} imports {name}: the library and the toy tasks do not know each other")
        if top == "tokenrl" and target == "tokenrl" and name != "tokenrl.__version__":
            own, other = LEVEL.get(room, FACADE), LEVEL.get(room_of(name), FACADE)
            if other > own or (other == own and room_of(name) != room):
                found.append(f"{module} imports {name}: imports only go down")
            inner, target_inner = folder_level(module, room), folder_level(name, room)
            same = room_of(name) == room and inner is not None and target_inner is not None
            if same and target_inner > inner:
                found.append(f"{module} imports {name}: imports only go down, inside a room too")
        if (
            top == "tokenrl"
            and room == "core"
            and target not in {*sys.stdlib_module_names, "torch", "jaxtyping", "tokenrl"}
        ):
            found.append(f"{module} imports {name}: core needs torch only")
    return found


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path):
    package = path.name == "__init__.py"
    assert forbidden_imports(text_of(path), module_name(path), package=package) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tokenrl.core.kl", "from tokenrl.runs import metrics"),
        ("tokenrl.core.kl", "def f():\n    import transformers"),
        ("tokenrl.core.kl", "from tokenrl import Estimator"),
        ("tokenrl.core.kl", "from ..language.policy import Policy"),
        ("tokenrl.language.training.step", "import tokenrl.control.worlds.bandit"),
        ("tokenrl.language.rewards.calls", "from tokenrl.language.tasks import task"),
        ("tokenrl.language.policy.model", "import tokenrl.language.inspect.chat"),
        ("tokenrl.lab.exact.report", "from tokenrl.lab.measure.measurement import measure"),
        ("tokenrl.errors", "from tokenrl.core import Estimator"),
        (
            "tokenrl.control.worlds.bandit",
            "if TYPE_CHECKING:\n    from tokenrl.language.policy.model import Policy",
        ),
        ("tokenrl.language.training.step", "from tokenrl import lab"),
        ("tokenrl.advisor", "import tokenrl.cli"),
        ("tokenrl.language.tasks.task", "import toy_tasks"),
        ("toy_tasks.addition", "from tokenrl.core import Estimator"),
        ("tests.test_recipes", "import recipes.train_lm"),
        ("tokenrl.cli", "from recipes import train_lm"),
    ],
)
def test_the_import_rule_notices(module, line):
    assert len(forbidden_imports(line, module)) == 1


def test_every_room_has_a_place_on_the_list():
    def rooms(folder):
        found = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        return found - {"__init__", "__pycache__"}

    assert rooms(ROOT / "tokenrl") <= set(LEVEL)
    for room, folders in INSIDE.items():
        assert rooms(ROOT / "tokenrl" / room) <= set(folders), room


def imported_when_run(path: Path, known: set[str]) -> set[str]:
    """Modules of tokenrl that a file imports, in functions too but not for type checkers alone."""
    nodes = nodes_of(text_of(path))
    checks = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    unused = {id(node) for check in checks for line in check.body for node in ast.walk(line)}
    module, found = module_name(path), set()
    run = (node for node in nodes if id(node) not in unused)
    for name in imports_among(run, module, package=path.name == "__init__.py"):
        # `from package import module` runs the package and the module; of a name in a module, the module.
        found |= {part for part in (name, name.rpartition(".")[0]) if part in known}
    return found - {module}


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Modules that reach themselves."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    return {module for module in graph if module in reached(module)}


def test_no_files_import_each_other_in_a_circle():
    files = {module_name(path): path for path in SOURCES if path.is_relative_to(ROOT / "tokenrl")}
    assert circles({module: imported_when_run(path, set(files)) for module, path in files.items()}) == set()
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == {"b", "c"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    text = text_of(path)
    assert len(text.splitlines()) <= 400
    functions = [n for n in nodes_of(text) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: code_lines(f) for f in functions if code_lines(f) > 60}
    assert long == {}


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring left out: a long explanation is no long function."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - ((docstring.end_lineno or docstring.lineno) - docstring.lineno + 1)


def test_no_file_is_called_utils():
    assert [path for path in SOURCES + TESTS if path.stem in ("utils", "util", "helpers", "misc")] == []


def unsafe(source: str) -> list[str]:
    """Calls that run text or bytes as code."""
    found = []
    for node in nodes_of(source):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe_load = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            if name in ("eval", "exec", "builtins.eval", "builtins.exec", "__import__"):
                found.append(f"line {node.lineno}: {name}")
            if name == "torch.load" and not safe_load:
                found.append(f"line {node.lineno}: torch.load")
            if any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords):
                found.append(f"line {node.lineno}: allow_pickle")
    picklers = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    return found + [name for name in imports(source, "tokenrl.x") if name.split(".")[0] in picklers]


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "recipes" not in p.parts], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_runs_data_as_code(path):
    assert unsafe(text_of(path)) == []


@pytest.mark.parametrize(
    "line",
    [
        *("eval(text)", "exec(text)", "import pickle", "from pickle import loads", "torch.load(path)"),
        *("torch.load(path, weights_only=False)", "numpy.load(path, allow_pickle=True)"),
    ],
)
def test_the_rule_about_code_notices(line):
    assert len(unsafe(line)) == 1
    assert unsafe("model.eval()\ntorch.load(path, weights_only=True)") == []


@cache
def functions_of(source: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    return {n.name: n for n in nodes_of(source) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}


def silent_tests(source: str, folder: Path = ROOT / "tests") -> list[str]:
    """Names of tests that only an error can fail: no assert, no raises, no check=True, no such helper.

    A helper stands in the test's file, or is imported from one in its `folder`.
    """
    own = functions_of(source)
    functions = dict(own)
    for node in nodes_of(source):
        if isinstance(node, ast.ImportFrom) and (beside := folder / f"{node.module}.py").is_file():
            defined = functions_of(text_of(beside))
            functions |= {a.name: defined[a.name] for a in node.names if a.name in defined.keys() - own}

    def asserts(name: str, seen: frozenset[str] = frozenset()) -> bool:
        for node in ast.walk(functions[name]):
            if isinstance(node, ast.Assert):
                return True
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func).split(".")[-1]
                checked = any(k.arg == "check" and ast.unparse(k.value) == "True" for k in node.keywords)
                if called in ("raises", "warns", "fail") or called.startswith("assert") or checked:
                    return True
                if called in functions and called not in seen and asserts(called, seen | {name}):
                    return True
        return False

    return [name for name in own if name.startswith("test") and not asserts(name)]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_asserts_something(path):
    assert silent_tests(text_of(path), path.parent) == []


def test_the_rule_about_tests_notices(tmp_path):
    helper = "def check(x):\n    assert x\n"
    assert silent_tests("def test_a():\n    print(1)\n") == ["test_a"]
    assert silent_tests(helper + "def test_b():\n    check(1)\n") == []
    assert silent_tests("def test_c():\n    test_c()\n") == ["test_c"]
    (tmp_path / "helpers.py").write_text(helper + "def look(x):\n    print(x)\n")
    imported = "from helpers import check, look\ndef test_d():\n    check(1)\ndef test_e():\n    look(1)\n"
    assert silent_tests(imported, tmp_path) == ["test_e"]
    assert silent_tests(imported) == ["test_d", "test_e"]


@pytest.mark.parametrize(
    "code",
    [
        "import tokenrl",
        "import toy_tasks",
        "import tokenrl.cli",
        "from tokenrl.core import Estimator; Estimator.preset('grpo').bias_status",
        "from tokenrl.cli import main; main(['--help'])",
        "from tokenrl.cli import main; main(['train', '--help'])",
        "from tokenrl.cli import main; main(['reward-model', '--help'])",
        "from tokenrl.cli import main; main(['control', '--help'])",
        "from tokenrl.cli import main; main(['advise', '--help'])",
    ],
)
def test_light_imports_stay_light(code):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {
        line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "import time:" in line
    }
    assert "tokenrl" in imported or "toy_tasks" in imported  # else the listing was not understood
    heavy = {"torch", "transformers", "accelerate", "datasets", "peft", "matplotlib", "pandas", "gymnasium"}
    assert imported & heavy == set()


def named_paths(text: str) -> set[str]:
    """Paths that a document names: relative links, and files or folders of this repository."""
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}
    folders = "tokenrl|toy_tasks|recipes|tests|docs"
    words = re.findall(rf"(?<![\w./-])((?:\./)?(?:{folders})/[\w./-]*\w\.\w+)", text)
    return {path for path in {*links, *words} if path}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_only_files_that_exist(path):
    missing = [
        n for n in named_paths(text_of(path)) if not ((path.parent / n).exists() or (ROOT / n).exists())
    ]
    assert missing == []


def test_the_rule_about_documents_notices():
    text = "[a](docs/a.md#top), `python recipes/b.py --x`, https://x.org/tests/c.py, tokenrl/core/kl.py."
    assert named_paths(text) == {"docs/a.md", "recipes/b.py", "tokenrl/core/kl.py"}
