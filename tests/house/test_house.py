"""The rules of the house, enforced on the source: budgets, who may import whom, light imports, honest tests.

A rule is a function from sources to what breaks it, so that it can be shown to notice a made-up breach.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import tokenrl
from tokenrl.runs.signals import BY_ITSELF

ROOT = Path(__file__).parents[2]

LIMITS = {
    "top": 15_880,
    "core": 20_710,
    "runs": 25_120,
    "control": 11_450,
    "advisor": 2_110,
    "language": 30,
    "language/policy": 14_440,
    "language/rewards": 13_900,
    "language/tasks": 12_400,
    "language/rollout": 28_120,
    "language/training": 27_890,
    "language/supervised": 7_680,
    "language/commands": 5_820,
    "language/preferences": 6_350,
    "language/evaluation": 3_450,
    "lab": 30,
    "lab/exact": 12_730,
    "lab/measure": 4_450,
    "lab/compare": 15_980,
}
"""Weight of each room, in nodes of its syntax trees. Comments, docstrings, line breaks and names for
intermediate values weigh nothing or next to it, so nothing is won by denser lines. A limit has 3 % of slack
when it is set, and is lowered when the room gets lighter; raising one is a line in a commit that says why."""
PACKAGE, FILES, HEART, TESTS, RECIPES, TOYS = 228_340, 202, 99_880, 266_990, 66_920, 7_430
HEART_ROOMS = ("errors", "names", "settings", "core", "language/policy", "language/rollout")
HEART_ROOMS += ("language/training", "runs/session")

ORDER = [
    ["errors"],
    ["user_code"],
    ["files"],
    ["names"],
    ["foreign"],
    ["settings"],
    ["keywords"],
    ["configuration"],
    ["core"],
    ["runs"],
]
ORDER += [["control", "language"], ["lab"], ["advisor"], ["flags"], ["cli"], ["__main__"]]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
INSIDE = {  # the folders of a room, from below
    "language": [
        *("policy", "rewards", "tasks", "rollout", "evaluation"),
        *("supervised", "training", "preferences", "commands"),
    ],
    "lab": ["exact", "measure", "compare"],
}
PUBLIC_ROOMS = ("core", "runs", "control", "language", "lab")


@dataclass(frozen=True)
class Source:
    """A file of Python: the name of its module, and its text."""

    module: str
    text: str
    package: bool = False

    @cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.text)))

    @cached_property
    def functions(self) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
        return {
            n.name: n for n in self.nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
        }

    @property
    def weight(self) -> int:
        """Nodes of the syntax tree."""
        return len(self.nodes)

    @property
    def room(self) -> str:
        """The room of the package that it lies in, with its folder where the room has several."""
        parts = self.module.split(".")[1:]
        if not parts or (len(parts) < 2 and not self.package):
            return "top"
        return "/".join(parts[:2]) if parts[0] in INSIDE else parts[0]

    def imports(self, *, types: bool = True) -> Iterator[str]:
        """Full names of what is imported anywhere; without `types` not what type checkers alone see."""
        unseen: set[int] = set()
        for node in self.nodes:
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                unseen |= {id(inner) for line in node.body for inner in ast.walk(line)}
        for node in self.nodes:
            if not types and id(node) in unseen:
                continue
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.module}: a relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)


def read(folder: str) -> list[Source]:
    sources = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        package = parts[-1] == "__init__"
        sources.append(
            Source(".".join(parts[:-1] if package else parts), path.read_text(), package)
        )
    return sources


PACKAGE_SOURCES, TOY_SOURCES, RECIPE_SOURCES, TEST_SOURCES = map(
    read, ("tokenrl", "toy_tasks", "recipes", "tests")
)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "recipes").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "recipes").rglob("*.ipynb"))


# ---- sizes ----


def test_every_room_keeps_its_budget():
    rooms: dict[str, int] = {}
    for source in PACKAGE_SOURCES:
        rooms[source.room] = rooms.get(source.room, 0) + source.weight
    assert {room: weight for room, weight in rooms.items() if weight > LIMITS.get(room, 0)} == {}
    heart = [source for source in PACKAGE_SOURCES if in_heart(source)]
    sizes = {"package": sum(rooms.values()), "files": len(PACKAGE_SOURCES), "heart": total(heart)}
    sizes |= {
        "tests": total(TEST_SOURCES),
        "recipes": total(RECIPE_SOURCES),
        "toys": total(TOY_SOURCES),
    }
    limits = dict(zip(sizes, (PACKAGE, FILES, HEART, TESTS, RECIPES, TOYS), strict=True))
    assert {name: size for name, size in sizes.items() if size > limits[name]} == {}


def in_heart(source: Source) -> bool:
    path = source.module.replace(".", "/").removeprefix("tokenrl").lstrip("/")
    return any(path == room or path.startswith(room + "/") for room in HEART_ROOMS)


def total(sources: list[Source]) -> int:
    return sum(source.weight for source in sources)


def oversized(sources: list[Source]) -> list[str]:
    found = []
    for source in sources:
        found += [f"{source.module}: a long file"] * (source.text.count("\n") > 400)
        for function in source.functions.values():
            body = function.body[1:] if ast.get_docstring(function) else function.body
            first, last = body[0].lineno if body else function.lineno, function.end_lineno or 0
            found += [f"{source.module}: {function.name} is long"] * (last - first >= 60)
    return found


def test_files_and_functions_have_a_size_that_can_be_read():
    assert oversized(PACKAGE_SOURCES) == []
    long = Source("tokenrl.x", "def f():\n" + "    pass\n" * 61)
    assert oversized([long]) == ["tokenrl.x: f is long"]
    assert oversized([Source("tokenrl.x", "a = 1\n" * 401)]) == ["tokenrl.x: a long file"]


def test_no_file_is_called_utils():
    names = [
        source.module.split(".")[-1] for source in PACKAGE_SOURCES + RECIPE_SOURCES + TEST_SOURCES
    ]
    assert {"utils", "util", "helpers", "misc", "common"}.isdisjoint(names)


READERS = r"errors|names|configuration|runs\.(origin|metrics)"
"""Modules that read files in another way: `read_file` itself, code that is imported, notes of this user, /proc."""


def unguarded(source: Source) -> list[str]:
    """Reads of files that may be a stranger's: a pipe in their place would be waited for without end."""
    texts = [ast.unparse(node) for node in source.nodes if isinstance(node, ast.Call)]
    return [
        text for text in texts if re.fullmatch(r"(?!.*__file__).*\.read_(bytes|text)\(.*", text)
    ]


def test_files_are_read_by_the_reader_that_waits_for_no_pipe():
    sources = [s for s in PACKAGE_SOURCES if not re.fullmatch(rf"tokenrl\.({READERS})", s.module)]
    assert {s.module: unguarded(s) for s in sources if unguarded(s)} == {}
    assert unguarded(Source("tokenrl.x", "(run / 'config.json').read_text()"))


# ---- imports ----

TYPED_CIRCLES = ("tokenrl.language.training.", "tokenrl.runs.rules")
"""Files that may name types of those above: a learner holds a memory of rows, and rules read one record."""


def circle(sources: list[Source]) -> set[str]:
    """Files that import each other, over others too: in functions, and (but in `TYPED_CIRCLES`) for type checkers."""
    known = {source.module for source in sources} - {"tokenrl"}
    graph = {}
    for source in sources:
        found = set()
        for name in source.imports(types=not source.module.startswith(TYPED_CIRCLES)):
            # `from package import module` runs the package and the module; of a name in a module, the module.
            found |= {part for part in (name, name.rpartition(".")[0]) if part in known}
        graph[source.module] = found - {source.module}
    while free := [module for module, others in graph.items() if not others & graph.keys()]:
        for module in free:
            del graph[module]
    return {*graph}


def upward(source: Source) -> list[str]:
    """Imports that break the order of rooms or of the folders in one, and those between separate parts."""
    found = []
    top, *own = source.module.split(".")
    for name in source.imports():
        target, *other = name.split(".")
        if target == "recipes" or {top, target} == {"tokenrl", "toy_tasks"}:
            found.append(name)
        if top != "tokenrl":
            continue
        foreign = target not in {*sys.stdlib_module_names, "torch", "jaxtyping", "tokenrl"}
        if own[:1] == ["core"] and foreign:
            found.append(f"{name}: core needs torch only")
        if target != "tokenrl" or name == "tokenrl.__version__":
            continue
        facade = len(ORDER)
        here, there = LEVEL.get((own or [""])[0], facade), LEVEL.get((other or [""])[0], facade)
        if there > here or (there == here and own[:1] != other[:1]):
            found.append(name)
        folders = INSIDE.get(own[0], []) if own and own[:1] == other[:1] else []
        if own[1:] and other[1:] and {own[1], other[1]} <= set(folders):
            found += [name] * (folders.index(other[1]) > folders.index(own[1]))
    return found


def test_imports_only_go_down():
    everything = PACKAGE_SOURCES + TOY_SOURCES + RECIPE_SOURCES
    assert {s.module: upward(s) for s in everything if upward(s)} == {}
    assert [
        s.module for s in TEST_SOURCES for name in s.imports() if name.split(".")[0] == "recipes"
    ] == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("tokenrl.core.losses", "from tokenrl.runs import metrics"),
        ("tokenrl.core.losses", "def f():\n    import transformers"),
        ("tokenrl.language.training.step", "import tokenrl.control.worlds"),
        ("tokenrl.lab.exact.report", "from tokenrl.lab.measure.measurement import measure"),
        ("tokenrl.control.run", "if TYPE_CHECKING:\n    from tokenrl.language.policy import x"),
        ("tokenrl.language.tasks.task", "import toy_tasks"),
        ("tokenrl.cli", "from recipes import train_lm"),
    ],
)
def test_the_import_rule_notices(module, line):
    assert len(upward(Source(module, line))) == 1


def test_every_room_has_a_place_on_the_list():
    parts = [source.module.split(".") for source in PACKAGE_SOURCES]
    assert {part[1] for part in parts if len(part) > 1} <= {*LEVEL}
    for room, folders in INSIDE.items():
        assert {part[2] for part in parts if part[1:2] == [room] and len(part) > 3} <= {*folders}


def test_no_files_import_each_other_in_a_circle():
    assert circle(PACKAGE_SOURCES) == set()
    hidden = (
        "if TYPE_CHECKING:\n    from tokenrl.b import x",
        "def f():\n    from tokenrl.a import y",
    )
    pair = [Source(f"tokenrl.{name}", text) for name, text in zip("ab", hidden, strict=True)]
    assert circle(pair) == {"tokenrl.a", "tokenrl.b"}


GUESTS = ("control", "lab/compare", "lab/measure")
"""Rooms that enter others by their doors, so that a change inside of those costs nothing here."""
DOORS = ("control", "language", "runs")
MOST_NAMES = 20
"""Names that a guest takes from one room at most; with more the seam between the two is wrong."""


def door_of(room: str) -> set[str]:
    """Names that a room has for others, as the stub of its package lists them."""
    stub = ast.parse((ROOT / "tokenrl" / room / "__init__.pyi").read_text())
    imports = [node for node in ast.walk(stub) if isinstance(node, ast.ImportFrom)]
    return {name.name for node in imports for name in node.names}


def entered(source: Source) -> list[tuple[str, str]]:
    """What a guest imports of other rooms: for each import the room, and the name or the path in it."""
    own = source.room.split("/")[0]
    names = [name.split(".", 2) for name in source.imports() if name.count(".") >= 2]
    inner = [(room, name) for _, room, name in names if room in DOORS and room != own]
    return inner if source.room in GUESTS else []


def test_a_room_is_entered_by_its_door():
    by_pair: dict[tuple[str, str], set[str]] = {}
    for source in PACKAGE_SOURCES:
        for room, name in entered(source):
            by_pair.setdefault((source.room, room), set()).add(name)
    beside = {pair: names - door_of(pair[1]) for pair, names in by_pair.items()}
    assert {pair: names for pair, names in beside.items() if names} == {}
    many = {pair: names for pair, names in by_pair.items() if len(names) > MOST_NAMES}
    assert many == {}
    named = {name for (_, room), names in by_pair.items() if room == "language" for name in names}
    assert len(named) <= 15
    line = "from tokenrl.runs.session import Session\nfrom tokenrl.runs import Session, session"
    through = entered(Source("tokenrl.control.run", line))
    assert [name for _, name in through if name not in door_of("runs")] == [
        "session.Session",
        "session",
    ]


def test_compare_knows_nothing_of_the_heart():
    sources = [source for source in PACKAGE_SOURCES if source.room == "lab/compare"]
    names = {name for source in sources for room, name in entered(source) if room == "language"}
    assert names == {"TrainArguments", "plan_training"}


def deep_imports(text: str) -> list[str]:
    """What is imported from below a room, where only the public names of tokenrl and its rooms should be."""
    names = re.findall(r"^ *(?:from|import) (tokenrl[\w.]*)", text, re.MULTILINE)
    return [
        name for name in names if name not in {"tokenrl", *map("tokenrl.{}".format, PUBLIC_ROOMS)}
    ]


def test_recipes_and_documents_use_public_names_only():
    shown = {source.module: source.text for source in RECIPE_SOURCES}
    del shown["recipes.site.reference"]  # it writes down what the code says of itself
    shown |= {path.name: path.read_text() for path in DOCUMENTS}
    for book in NOTEBOOKS:
        cells = json.loads(book.read_text())["cells"]
        shown[book.name] = "\n".join("".join(cell["source"]) for cell in cells)
    assert {name: deep_imports(text) for name, text in shown.items() if deep_imports(text)} == {}
    assert deep_imports("from tokenrl.core.kl import k1") == ["tokenrl.core.kl"]
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
        assert name not in {path.stem for path in Path(package.__file__).parent.iterdir()}, name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'; it has "):
        package.nonsense  # noqa: B018


LIGHT = """
import sys, tokenrl, toy_tasks, tokenrl.cli
from tokenrl.core import Estimator
Estimator.preset('grpo').bias_status
tokenrl.cli.main(['--help'])
for name in ("train", "reward-model", "control", "compare", "advise"):
    try: tokenrl.cli.main([name, '--help'])
    except SystemExit: pass
"""
DRAWN = """
from tokenrl.runs import markup, plots, report
light = {*sys.modules}
import pandas
curve = pandas.DataFrame({'value': [0, 1]})
plots.svg(plots.Chart('n', 'u', {'': curve}), 400, 200)
assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules
"""


def test_light_imports_stay_light():
    """Matplotlib is loaded when something is drawn, and pyplot never."""
    heavy = {"torch", "transformers", "accelerate", "datasets", "peft", "gymnasium", "scipy"}
    drawing = {"matplotlib", "pandas", "jinja2"}
    code = f"{LIGHT}assert not {heavy | drawing} & sys.modules.keys(), sorted(sys.modules)\n"
    code += f"{DRAWN}assert not {drawing} & light, sorted(light)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- safety and honesty ----


def test_nothing_runs_data_as_code():
    """Calls of eval, exec and pickle are found by ruff."""
    for source in PACKAGE_SOURCES + TOY_SOURCES:
        loads = re.findall(r"torch\.load\(file.*|allow_pickle=True", source.text)
        assert all("weights_only=True" in line for line in loads), source.module


ASSERTS = re.compile(
    r"\bassert|raises\(|refused\(|stopped\(|completes\(|fail\(|check=True|check_\w+\("
)


def silent_tests(source: Source) -> list[str]:
    """Names of tests that only an error can fail: no assert, no raises, no check=True, no such helper."""
    tests = {name: ast.unparse(f) for name, f in source.functions.items() if name[:4] == "test"}
    return [name for name, text in tests.items() if not ASSERTS.search(text.split("\n", 1)[1])]


def test_every_test_asserts_something():
    assert {s.module: silent_tests(s) for s in TEST_SOURCES if silent_tests(s)} == {}
    assert silent_tests(Source("x", "def test_a():\n    print(1)\n")) == ["test_a"]
    assert silent_tests(Source("x", "def test_assert_b():\n    test_c()\n")) == ["test_assert_b"]


def named_paths(text: str) -> set[str]:
    """Paths that a document names: relative links, and files or folders of this repository."""
    links = {
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link
    }
    words = re.findall(
        r"(?<![\w./-])((?:\./)?(?:tokenrl|toy_tasks|recipes|tests)/[\w./-]*\w\.\w+)", text
    )
    return {path for path in {*links, *words} if path}


def test_documents_name_only_files_that_exist():
    missing = [
        f"{document.name}: {name}"
        for document in DOCUMENTS
        for name in named_paths(document.read_text())
        if not ((document.parent / name).exists() or (ROOT / name).exists())
    ]
    assert missing == []
    text = "[a](docs/a.md#top), `python recipes/b.py --x`, https://x.org/tests/c.py, tokenrl/core/kl.py."
    assert named_paths(text) == {"docs/a.md", "recipes/b.py", "tokenrl/core/kl.py"}


def test_exit_reasons_agree():
    """Each reason for which a training ends itself is in the table of those, and described."""
    calls = [re.findall(r"(?:session|self)\.end\((.*)\)", s.text) for s in PACKAGE_SOURCES]
    reasons = {*re.findall(r'"([a-z-]+)"', str(calls).replace("'", ""))}
    assert reasons == {*BY_ITSELF, "check"}
    described = f"{tokenrl.RunResult.__doc__}{tokenrl.ControlResult.__doc__}"
    assert [reason for reason in reasons if f"`{reason}`" not in described] == []
