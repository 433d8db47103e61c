"""Writes the reference: commands and their flags, axes and presets, metrics, Python's public names.

`recipes/pages/reference/` is its output, made of the code itself; a test compares the two. Pages of the reference
that are written by hand (`run_directory.md`, `glossary.md`, `papers.md`) lie beside these.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from inspect import cleandoc
from pathlib import Path
from typing import Any

import tyro
from docstring_parser import parse

from tokenrl import Estimator
from tokenrl.cli import COMMANDS
from tokenrl.core import CHOICES, PRESETS
from tokenrl.flags import dataclasses_of, described_fields
from tokenrl.runs import all_metrics
from tokenrl.settings import allowed, field_types

PAGES = Path(__file__).parents[1] / "pages" / "reference"
COMMAND_PAGES = """train
sft, reward-model
evaluate, sample
control
compare, judge, report, advise
lab exact, lab measure"""
"""The commands that share a page, which is called by its first word."""
ROOMS = (
    "tokenrl.core",
    "tokenrl.language",
    "tokenrl.control",
    "tokenrl.lab",
    "tokenrl.runs",
    "tokenrl",
)
SETTINGS = {field for command in COMMANDS.values() for field in field_types(command.arguments)}
FLAGS = ("flag", "default", "allowed", "meaning")
(POSITIONAL,) = tyro.conf.Positional[str].__metadata__
"""Marks what a command takes without a flag."""
MAX_KEYWORDS = 8
"""A function with more settings of a command among its keywords is shown without them."""
LINE_LENGTH = 88
GENERATED = "<!-- Made by recipes/site/reference.py of the code; change it there. -->"


def cell(text: object) -> str:
    """Return a text that fits into a cell of a table."""
    return re.sub(r"\s+", " ", str(text)).replace("|", r"\|").strip()


def table(head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return "\n".join(lines)


def cards(kind: str, head: tuple[str, ...], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table whose rows are cards on a telephone; tables.css labels their lines by the kind."""
    return f'<div class="cards {kind}" markdown>\n\n{table(head, rows)}\n\n</div>'


def page(title: str, *parts: str) -> str:
    """Return a page of its title and its parts."""
    return "\n\n".join([f"# {title}", GENERATED, *parts]) + "\n"


def default_of(field: Any) -> str:
    """Return the default of a setting as users write it; `-` where it is left open."""
    if field.default is field.default_factory:
        return "required"
    default = field.metadata.get("usual", field.default)
    words = ["as in the run"] if "usual" in field.metadata else []
    if default not in (None, (), "", MISSING):
        values = default if isinstance(default, tuple) else [default]
        words.append(f"`{' '.join(map(str, values))}`")
    return ", else ".join(words) or "-"


def settings_tables(kind: type[Any], prefix: str = "--", level: str = "##") -> Iterator[str]:
    """Yield a heading of a level and a table for each group of the settings of a command."""
    hints = field_types(kind)
    groups = {owner.group: [] for owner in dataclasses_of(kind)}
    for owner, field, text in described_fields(kind):
        hint = hints[field.name]
        flag = f"{prefix}{field.name.replace('_', '-')}"
        if POSITIONAL in getattr(hint, "__metadata__", ()):
            flag = field.name.upper()
        row = (f"`{flag}`", default_of(field), allowed(hint) or "any", text)
        groups[owner.group].append(row)
    for title, rows in groups.items():
        if rows:
            heading = f"{title[0].upper()}{title[1:]}" if title else "Main settings"
            yield f"{level} {heading}\n\n" + cards("flags", FLAGS, rows)


def command_page(names: str) -> str:
    """Return the page of a command, or of several, with a section for each."""
    level = "###" if "," in names else "##"
    parts = [part for name in names.split(", ") for part in command_parts(name, level)]
    return page(f"tokenrl {names}", *parts)


def command_parts(name: str, level: str) -> Iterator[str]:
    """Yield what a command does, an example, and each flag with its default and bounds; train has the metrics."""
    command = COMMANDS[name]
    summary, _, details = cleandoc(command.arguments.__doc__).partition("\n\n")
    texts = Path(__file__).with_name("examples.txt").read_text(encoding="utf-8")
    examples = dict(text.split("\n", 1) for text in texts.split("\n## ")[1:])
    if level == "###":
        yield f"## tokenrl {name}"
    yield from (summary, examples[name].strip(), *filter(None, [details]))
    if "estimator" in field_types(command.arguments):
        yield "`--estimator.AXIS` changes one axis of the estimator: see [the axes](axes.md)."
    yield from settings_tables(command.arguments, level=level)
    if f"{name}, results" in examples:
        yield f"{level} Results\n\n" + examples[f"{name}, results"].strip()
    if name == "train":
        yield from metrics()


def axes_page() -> str:
    """Return the page of the estimator: its axes, what each choice does to the gradient, and the presets."""
    parts = [cleandoc(str(Estimator.__doc__)), *settings_tables(Estimator, "--estimator.")]
    for axis, choices in CHOICES.items():
        rows = [
            (f"`{name}`", choice.status, choice.reason, choice.needs)
            for name, choice in choices.items()
        ]
        parts.append(
            f"## Choices of {axis}\n\n"
            + table(("choice", "expected gradient", "why", "needs"), rows)
        )
    return page("The axes and presets of the estimator", *parts, *presets())


def presets() -> tuple[str, ...]:
    """Return a section on all presets: fields, paper, declared bias, and what no axis expresses."""
    rows = []
    for name, preset in PRESETS.items():
        changes = ", ".join(f"{axis}={value}" for axis, value in preset.fields.items())
        paper = re.sub(r"(?<=\w)/(?=\w)", "/<wbr>", preset.paper)  # paths may break between lines
        bias = Estimator.preset(name).bias_status
        rows.append((f"`{name}`", preset.origin, paper, changes, bias))
    fields = ("fields that differ from rloo", "expected gradient")
    head = ("preset", "who has it", "paper or toolkit", *fields)
    beyond = [(f"`{name}`", preset.beyond) for name, preset in PRESETS.items() if preset.beyond]
    about = "### What no axis expresses\n\nWhat the toolkits do beside these fields, and what it changes."
    words = ("preset", "what no axis expresses, and what it changes")
    return "## The presets", table(head, rows), about, table(words, beyond)


def metrics() -> Iterator[str]:
    """Yield a section on all metrics."""
    rows = [
        (f"`{metric.name}`", metric.unit or "-", metric.better or "-", metric.meaning)
        for metric in all_metrics()
    ]
    yield (
        "## Metrics and their units\n\n"
        "What `metrics.jsonl`, `timings.jsonl`, `summary.json` and `tokenrl evaluate` hold. Metrics of held-out "
        "prompts begin with `eval_`, and `NAME_stderr` is the standard error of `NAME`."
    )
    yield table(("name", "unit", "better", "meaning"), rows)


def documented(thing: Any) -> str:
    """Return the docstring of a public function or class as Markdown, with lists of arguments and errors."""
    docstring = parse(inspect.getdoc(thing) or "")
    parts = [docstring.short_description, docstring.long_description]
    for title, kind in (("Arguments", "param"), ("Attributes", "attribute")):
        entries = [entry for entry in docstring.params if entry.args[0] == kind]
        if entries:
            lines = [f"* `{entry.arg_name}`: {cell(entry.description)}" for entry in entries]
            parts.append("\n".join([f"{title}:", "", *lines]))
    if docstring.returns:
        parts.append(f"Returns: {cell(docstring.returns.description)}")
    parts += [
        f"Raises `{error.type_name}`: {cell(error.description)}" for error in docstring.raises
    ]
    return "\n\n".join(filter(None, parts))


def signature_of(name: str, thing: Any) -> str:
    """Return the signature of a function; the settings of a command are on the page of that command."""
    signature = inspect.signature(thing)
    entries = signature.parameters.values()
    with_settings = sum(entry.name in SETTINGS for entry in entries) > MAX_KEYWORDS
    parameters = []
    for entry in entries:
        is_first = "*" not in " ".join(parameters)
        if entry.kind is entry.KEYWORD_ONLY and is_first:
            parameters.append("*")
        if not with_settings or entry.name not in SETTINGS:
            parameters.append(str(entry))
    returned = signature.return_annotation
    end = "" if returned is signature.empty else f" -> {returned}"
    line = f"{name}({', '.join(parameters)}){end}"
    if len(line) > LINE_LENGTH:
        line = "\n    ".join([f"{name}(", *(f"{text}," for text in parameters)]) + f"\n){end}"
    return re.sub(r"<function (<?\w+>?) at 0x\w+>", r"\1", line.replace("'", ""))


def public_functions(package: Any) -> Iterator[tuple[str, Any]]:
    """Yield the public functions and classes of a package, each class before its public methods."""
    for name in dir(package):
        thing = getattr(package, name)
        if not name.startswith("_") and callable(thing):
            yield name, thing
            for method, function in inspect.getmembers(thing, inspect.isfunction):
                if not method.startswith("_") and function.__module__.startswith("tokenrl"):
                    yield f"{name}.{method}", function


def entry(name: str, thing: Any) -> str:
    """Return the section of a public name, with its signature and docstring."""
    _, dot, last = name.rpartition(".")
    code = f"class {name}" if inspect.isclass(thing) else signature_of(last, thing)
    return f"##{'#' * len(dot)} {name}\n\n```py\n{code}\n```\n\n{documented(thing)}"


def pages() -> dict[str, str]:
    """Return all pages by the name of their files; a public name is on the page of one package."""
    named = {
        f"{names.split()[0].strip(',')}.md": command_page(names)
        for names in COMMAND_PAGES.splitlines()
    }
    named["axes.md"] = axes_page()
    homes: dict[tuple[str, Any], str] = {}
    for room in ROOMS:
        file = f"{room.replace('.', '_')}.md"
        package = importlib.import_module(room)
        functions = [*public_functions(package)]
        links = [
            f"[`{found[0]}`]({homes[found]}#{found[0].lower()})"
            for found in functions
            if found in homes and "." not in found[0]
        ]
        also = [f"These are on the pages of their rooms: {', '.join(links)}."] if links else []
        entries = [entry(*found) for found in functions if found not in homes]
        named[file] = page(room, cleandoc(package.__doc__ or ""), *also, *entries)
        homes |= dict.fromkeys(functions, file)
    return named


def main(output: Path = PAGES) -> None:
    """Write the pages."""
    output.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (output / name).write_text(text, encoding="utf-8")
        print(output / name)


if __name__ == "__main__":
    tyro.cli(main)
