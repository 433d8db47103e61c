"""Reads settings from files: the config.json of a run, or settings in JSON or YAML. Imports no torch.

The config.json of a run may name code: a task, rewards, an environment, a baseline, an engine. The types of the
fields say which (`NamesCode`). Whoever reads the run of somebody else must not execute it. So each training notes
hashes of the files that its settings name, among the settings of this user (`note_code`). `check_code` refuses a
name whose file is not among them, has changed since, or lies in the directory of the run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.errors import Refused, read_file, refusing
from tokenrl.names import NamesCode, source_file
from tokenrl.settings import Settings, arguments, field_types, parts_of

T = TypeVar("T")

RECORDED = {
    "kind",
    "versions",
    "title",
    "solved",
    "horizon",
    "pairs",
    "command",
    "chat_prompts",
    "task_rows",
    "warm_started",
    "code",
    "hashes",
}
"""Names in the config.json of a run that are no settings."""
TEXTS = ("prompt_template", "teacher_template", "system_prompt", "stop", "prompt")
"""Settings that hold text for the model."""
ESCAPE = re.compile(
    r"\\(n(?!(abla|atural|e|earrow|eg|eq|i|mid|ot|otin|u|warrow|ewline)(?![a-zA-Z]))"
    r"|r(?!(angle|brace|brack|ceil|floor|ho|ight|ightarrow|m|vert)(?![a-zA-Z]))"
    r"|t(?!(an|anh|au|ext|extbf|extit|frac|heta|herefore|ilde|imes|o|op|riangle)(?![a-zA-Z])))"
)
"""A line break, a carriage return or a tab as programs write them, but none of TeX's commands, such as \\times."""


@dataclass(frozen=True)
class TrustArguments(Settings, group="trust"):
    """Whether code that a run names is executed."""

    trust_run: bool = False
    """Execute whatever code the config.json of a run names, such as rewards or a baseline. Give it only for
    runs of people whom you trust. Without it, what you name yourself is executed, and of what the run names
    only files outside of its directory with which you have trained and that have not changed since."""


def configured(
    kind: type[T], path: str | os.PathLike[str], command: str, *, anew: bool = False
) -> T:
    """Make a dataclass of settings from a file: a run's config.json, or settings in JSON or YAML.

    Args:
        kind: The dataclass of settings to make.
        path: The file, or the directory of a run.
        command: The command that uses the settings; a run's config.json names its own command as its `kind`.
        anew: Whether the settings are for a new run, which does not take the output_dir of a run's
            config.json. Otherwise flags decide whether a run is continued or replaced, not the file.

    Raises:
        Refused: The file cannot be read, belongs to another command, or has a setting that is not allowed.
    """
    stored = read_config(path)
    kind_of_file = stored.get("kind", command)
    if kind_of_file != command:
        raise Refused(
            f"The configuration {path} is for `tokenrl {kind_of_file}`; give it to that command."
        )
    try:
        of_a_run = directory_of(path, stored) is not None
        left_out = {*RECORDED}
        if of_a_run or not anew:
            left_out |= {"resume", "overwrite"}
        if of_a_run and anew:
            left_out |= {"output_dir"}
        if of_a_run:
            left_out |= {"trust_run", "trust_remote_code", "quiet"}
            # settings of an earlier version
            earlier = stored.keys() - field_types(kind)  # type: ignore[arg-type]
            left_out |= {name for name in earlier if not stored[name]}
        values = {name: value for name, value in stored.items() if name not in left_out}
        return arguments(kind, values, objects=False)
    except Refused as error:
        raise Refused(
            f"The configuration {path} cannot be used by tokenrl {command}: {error}"
        ) from error


def directory_of(path: str | os.PathLike[str], stored: Mapping[str, Any]) -> Path | None:
    """Return the directory of the run that a configuration is of; None of settings that a person wrote.

    Args:
        path: the configuration: a directory, its config.json, or a file of settings.
        stored: what it holds.
    """
    file = Path(path).resolve()
    if file.is_dir():
        return file
    return file.parent if file.name == "config.json" or "versions" in stored else None


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a configuration in JSON or YAML, or the config.json of a run directory.

    Raises:
        Refused: The file cannot be read, or it is not a mapping of names to values.
    """
    file = Path(path, "config.json") if os.path.isdir(path) else Path(path)
    with refusing(
        f"The file {file!s:.300} cannot be read",
        "Correct or remove it, or give the settings in JSON or YAML.",
    ):
        text = read_file(file).decode()
        is_yaml = file.suffix in (".yaml", ".yml")
        config = _from_yaml(text) if is_yaml else UNIQUE_KEYS.decode(text)
    if not isinstance(config, dict):
        raise Refused(f"The file {file} is a {type(config).__name__}; it must map names to values.")
    return config


def check_escapes(options: Mapping[str, Any]) -> None:
    """Refuse texts for the model with an escape that nobody has read, as a shell leaves it in double quotes."""
    for name in TEXTS:
        if escape := ESCAPE.search("".join(options.get(name) or "")):
            raise Refused(
                f"{name} holds {escape[0]}, a backslash and a letter. A shell makes a line break of $'\\n'. "
                "The two characters themselves can be given from Python or in a file of settings."
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of these keys and values.

    Raises:
        ValueError: A key is given a second time.
    """
    values = dict[str, Any]()
    for name, value in pairs:
        if name in values:
            raise ValueError(f"an object gives {name!r} a second time: leave out one")
        values[name] = value
    return values


UNIQUE_KEYS = json.JSONDecoder(object_pairs_hook=_unique)
"""Reads JSON; a ValueError names the key that an object gives a second time."""


PLAIN = {
    "null": "~|null|Null|NULL|",
    "bool": "true|True|TRUE|false|False|FALSE",
    "int": "[-+]?(0|[1-9][0-9]*)",
    "float": r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
    "merge": "<<",
}
"""By type, which words of YAML without quotes are of it; all others are text."""


def _from_yaml(text: str) -> Any:
    """Read YAML as its version 1.2 defines words and numbers.

    PyYAML alone reads version 1.1, in which `no` and `on` are booleans, `12:30` is a number, 2026-01-31 is no
    text, and `1e-5` is text. It also takes the last value of a key that a mapping gives a second time.
    """
    import yaml

    def construct_mapping(self: Any, node: Any, deep: bool = False) -> Any:
        _unique([(str(key.value), value) for key, value in node.value])
        return yaml.SafeLoader.construct_mapping(self, node, deep)

    loader: Any = type("Loader", (yaml.SafeLoader,), {"construct_mapping": construct_mapping})
    loader.yaml_implicit_resolvers = {
        None: [(f"tag:yaml.org,2002:{kind}", re.compile(f"({x})$")) for kind, x in PLAIN.items()]
    }
    config = yaml.load(text, loader)
    if isinstance(config, dict):
        return {str(name): value for name, value in config.items()}
    return config


def values_of_code(kind: Any, settings: Any) -> Iterator[tuple[str, NamesCode, Any]]:
    """Yield each value of a field that may name code, with the name and the mark of the field.

    Args:
        kind: a dataclass of settings; the fields of those inside of it are called `estimator.baseline` and so on.
        settings: the values by field, or an object of the class. One that stands in a list or a dict comes by itself.
    """
    values = getattr(settings, "__dict__", settings)
    for name, hint in field_types(kind).items():
        value = values.get(name)
        for part in parts_of(hint):
            if isinstance(part, NamesCode):
                items = [*value.values()] if isinstance(value, Mapping) else value
                for item in items if isinstance(items, list | tuple) else [items]:
                    yield name, part, item
            elif isinstance(part, type) and is_dataclass(part):
                for inner, mark, item in values_of_code(part, value or {}):
                    yield f"{name}.{inner}", mark, item


def code_in(kind: Any, settings: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield the code that settings name: the setting, its text, and the module or the file that is imported."""
    for name, mark, text in values_of_code(kind, settings):
        if isinstance(text, str) and (source := mark.source(text)):
            yield name, text, source


def note_code(kind: type[Any], settings: Mapping[str, Any]) -> None:
    """Note the files that the settings of a training name, so that this user's runs may name them later."""
    with suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        prints = {_print(text, source) for _, text, source in code_in(kind, settings)}
        new = prints - {None, *_noted()}
        file = _notes()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(0o600)
        with file.open("a") as notes:
            notes.writelines(f"{print_of_file}\n" for print_of_file in new)


def _print(text: str, source: str) -> str | None:
    """Return a hash of a name and the content of the file that importing it executes; None without a file."""
    file = source_file(source)
    if file is None:
        return None
    return sha256(text.encode() + b"\0" + file.read_bytes()).hexdigest()


def _noted() -> list[str]:
    """Return the hashes of the code with which this user has trained."""
    with suppress(OSError, RuntimeError):
        return _notes().read_text().split()
    return []


def _notes() -> Path:
    settings = os.environ.get("XDG_CONFIG_HOME", "")
    folder = Path(settings) if os.path.isabs(settings) else Path.home() / ".config"
    return folder / "tokenrl" / "trained_code"


def check_code(
    kind: type[Any],
    settings: Mapping[str, Any],
    path: str | os.PathLike[str],
    stored: Mapping[str, Any],
    typed: Collection[str] = (),
    *,
    trusted: bool,
) -> None:
    """Refuse code that the configuration of a run names, unless it is trusted or this user trained with it.

    Args:
        kind: the dataclass of settings, whose types say which of them may name code.
        settings: the settings that are taken from the configuration.
        path: the directory of the run, its config.json, or a file of settings, which may name any code.
        stored: all that the configuration holds.
        typed: the settings that the user gave instead; `estimator` stands for all its axes.
        trusted: whether the user trusts the run (--trust-run).

    Raises:
        Refused: it names code that must not be executed. Nothing has been imported.
    """
    run = directory_of(path, stored)
    if trusted or run is None:
        return
    faults = [
        f"{name} {text!r:.200} {fault}"
        for name, text, source in code_in(kind, settings)
        if {name, name.partition(".")[0]}.isdisjoint(typed) and (fault := _fault(text, source, run))
    ]
    if faults:
        raise Refused(
            f"The configuration of the run in {run} names code that is not executed: {'; '.join(faults)}. "
            "Give these settings yourself, or --trust-run (trust_run=True) if you trust whoever made the run."
        )


def _fault(text: str, source: str, run: Path) -> str:
    """Say why code that a run names must not be executed; nothing if it may be."""
    file = source_file(source)
    if file is None:
        return f"was not found from {Path.cwd()}"
    paths = [file, file.parent]
    if not source.endswith(".py"):
        paths.append(Path.cwd())
    if any(path.resolve().is_relative_to(run) for path in paths):
        return "is looked for in the directory of the run"
    if _print(text, source) not in _noted():
        return "is no file with which you have trained, or it has changed since"
    return ""
