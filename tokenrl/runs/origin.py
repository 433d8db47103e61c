"""Records how a run was started: its command, its settings, and the versions of what it depends on."""

from __future__ import annotations

import inspect
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, partial
from hashlib import sha256
from importlib import import_module, metadata
from itertools import islice
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from tokenrl.configuration import values_of_code
from tokenrl.errors import USER_CODE_FAILED
from tokenrl.names import NamedFunction, source_file
from tokenrl.user_code import PLAIN

_PACKAGES = (
    "tokenizers",
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "gymnasium",
    "numpy",
    "safetensors",
)
_INSTALLED = re.compile(r"[\\/](site|dist)-packages[\\/]")
_PYTHON = os.path.join(os.path.dirname(os.__file__), "")
_NOT_HASHED = {"__main__", "__mp_main__", "tokenrl", "toy_tasks"}
"""Folders of installed packages, that of Python's own modules, and modules that start runs or have versions."""

MOST = 10_000
"""Items of a long list of objects, or of a dict, that count as its value."""


def origin_of(
    kind: str, values: Mapping[str, Any], names: Mapping[str, str | None], config: Path
) -> tuple[dict[str, Any], str]:
    """Return how this process was started.

    Args:
        kind: the command that runs, such as train.
        values: the settings, by name.
        names: by field, the text that stands for an object given from Python.
        config: where the settings are written, for a command that reads them.

    Returns:
        All settings by field, with names in place of objects; and the command line that repeats the run,
        empty if there is none, because the program gave the run objects that have no name outside of it.
    """
    objects = {
        name: word for name, word in names.items() if not isinstance(values[name], str | None)
    }
    command = typed_command()
    named = all(isinstance(values[name], os.PathLike) for name in objects) and _has_names(values)
    if named and not command:
        command = shlex.join(["tokenrl", kind, "--config", str(config), "--overwrite"])
    return {**values, **objects}, command


def repetition(command: str) -> list[str]:
    """Return lines of Markdown: the command that repeats a run, if there is one."""
    if not command:
        return ["It was started from Python. The file config.json of the run holds the settings."]
    return ["This command repeats the run:", "", "```sh", command, "```"]


def typed_command() -> str:
    """Return the command that was typed; empty in a Python program."""
    # or by python -m tokenrl
    if re.search(r"(^|[\\/])tokenrl([\\/]__main__\.py|\.\w+)?$", sys.argv[0]):
        return shlex.join(["tokenrl", *sys.argv[1:]])
    return ""


def _has_names(value: Any) -> bool:
    """Return whether every function in the settings can be imported by its name in another program."""
    if isinstance(value, Mapping | list | tuple):
        return all(map(_has_names, value.values() if isinstance(value, Mapping) else value))
    if callable(value) and not isinstance(value, str):
        name = getattr(value, "__qualname__", "<")
        return "<" not in name and getattr(value, "__module__", "__main__") != "__main__"
    if is_dataclass(value):
        return all(_has_names(getattr(value, f.name)) for f in fields(value))
    return True


def code_of(
    kind: type[Any], settings: Mapping[str, Any], objects: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the functions and objects of the user that a run is made with, by their settings and names.

    Args:
        kind: the dataclass of settings, whose types say which of them may name code.
        settings: the settings of the run.
        objects: what stands for some of these, by name, such as the rewards of its task.
    """
    code = dict[str, Any]()
    for setting, thing in _things({**values_of_code(kind, settings), **objects}):
        label = f"{setting} {_name_of(thing)}"
        while label in code:  # as of two functions without a name
            label += "'"
        code[label] = thing
    return code


def _things(named: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the functions and objects in settings, each with its setting, and as parts of a dict with its key."""
    for name, value in named.items():
        if isinstance(value, Mapping):
            yield from _things({f"{name}.{key}": part for key, part in value.items()})
        for part in value if isinstance(value, list | tuple) else [value]:
            thing = part.load() if isinstance(part, NamedFunction) else part
            if thing is not None and not isinstance(thing, str | Mapping):
                yield name, thing


def hashes_of_values(code: Mapping[str, Any]) -> dict[str, str]:
    """Return a hash of each value that functions and objects of the user hold beside their source.

    These are the values of closures, defaults, partial applications and attributes. An object with a state_dict
    holds none: what it says is its state is no code.

    Args:
        code: the functions and objects, as `code_of` returns them.
    """
    hashes = dict[str, str]()
    for name, thing in code.items():
        with suppress(*USER_CODE_FAILED):  # objects may compute attributes
            values = {} if _is_own(thing) else _values_of(thing)
            hashes |= {f"{name}.{key}": _hash(_stable(x).encode()) for key, x in values.items()}
    return hashes


def _values_of(code: Any) -> dict[str, Any]:
    """Return the values that a function or an object holds, by name."""
    if isinstance(code, partial):
        by_place = {str(place): value for place, value in enumerate(code.args)}
        return _values_of(code.func) | by_place | code.keywords
    if isinstance(code, MethodType):
        return _values_of(code.__func__) | _values_of(code.__self__)
    if isinstance(code, type) or hasattr(code, "state_dict"):
        return {}
    values = dict(getattr(code, "__dict__", {}))
    if isinstance(code, FunctionType):
        values |= inspect.getclosurevars(code).nonlocals
        parameters = inspect.signature(code).parameters.values()
        values |= {x.name: x.default for x in parameters if x.default is not x.empty}
    return values


def _stable(value: Any, above: tuple[int, ...] = ()) -> str:
    """Return a text that equal values share in every process; of what has none the name of its type.

    Of a long list, but one of numbers and texts alone, the first items count.

    Args:
        value: the value.
        above: the ids of what it is a part of.
    """
    kind = type(value)
    if kind in PLAIN:
        return repr(value)
    text = kind.__qualname__
    if id(value) in above:
        return text
    inner = partial(_stable, above=(*above, id(value)))
    with suppress(*USER_CODE_FAILED):
        if hasattr(value, "dtype") and hasattr(value, "tolist"):
            is_plain = not getattr(value.dtype, "hasobject", False)
            return f"{value.dtype} {_hash(_bytes(value))}" if is_plain else inner(value.tolist())
        if isinstance(value, Mapping):
            pairs = islice(value.items(), MOST)
            return f"{text} {len(value)} {sorted(map(inner, pairs))}"
        if isinstance(value, set | frozenset):
            return f"{text} {sorted(map(inner, value))}"
        if isinstance(value, list | tuple):
            is_plain = {*map(type, value)} <= PLAIN
            items = value if is_plain else [*map(inner, value[:MOST])]
            return f"{text} {len(value)} {items}"
        if is_dataclass(value) or isinstance(value, FunctionType | MethodType | partial | type):
            name = _name_of(value)
            if _is_own(value) or _is_foreign(_file_of(_named(value).__module__)):
                return name
            return f"{name} {_hash_of_source(value)} {inner(_values_of(value))}"
    return text


def _bytes(array: Any) -> bytes:
    """Return the shape and the numbers of an array of numpy or torch as bytes."""
    numbers = array
    if type(array).__module__.startswith("torch"):
        numbers = array.detach().cpu().reshape(-1).view(sys.modules["torch"].uint8).numpy()
    return f"{[*array.shape]}".encode() + bytes(numbers.tobytes())


def module_hashes(recorded: Iterable[str] = ()) -> dict[str, str]:
    """Return a hash of each module of the user that this process has imported, by `module NAME`.

    Those of Python, of installed packages and of this one do not count, nor does the program itself, which may
    start a run with other settings. A module that is imported inside a function counts once the function has
    been called. One that another process imports, as that of rewards with a deadline, is not seen.

    Args:
        recorded: names of hashes of an earlier process; their modules count too, imported or not.
    """
    hashes = {}
    modules = (name.removeprefix("module ") for name in recorded if name.startswith("module "))
    for name in sorted({*sys.modules, *modules}):
        path = _file_of(name)
        # Texts, since a process has imported thousands of modules, and each checkpoint asks for all of them.
        if name.partition(".")[0] in _NOT_HASHED or _is_foreign(path):
            continue
        if (file := Path(path)).is_file():
            hashes[f"module {_label_of(name)}"] = _hash(file.read_bytes())
    return hashes


def _file_of(module: str) -> str:
    """Return the path of the file of a module, imported or not; `None` as text without one."""
    imported = sys.modules.get(module)
    return str(vars(imported).get("__file__") if imported else source_file(module))


def _label_of(module: str) -> str:
    """Return the name of a module; a file has a hash of its path for one if its own is that of another module."""
    return Path(_file_of(module)).stem if module.startswith("tokenrl_file_") else module


def _is_foreign(path: str) -> bool:
    """Return whether a file is one of Python or of an installed package."""
    return path.startswith(_PYTHON) or bool(_INSTALLED.search(path))


def names_of(code: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of functions and objects of the user in their order, by their settings."""
    names = dict[str, str]()
    for label, thing in code.items():
        setting = label.partition(" ")[0]
        name = str(_named(thing).__qualname__)
        names[setting] = f"{names[setting]}, {name}" if setting in names else name
    return names


def hashes_of_sources(code: Mapping[str, Any]) -> dict[str, str]:
    """Return a hash of the source of each function or object of the user."""
    return {label: _hash_of_source(thing) for label, thing in code.items()}


def _hash_of_source(code: Any) -> str:
    """Return a hash of the source of a function, or of the class of a method or an object."""
    source = _named(code)
    if isinstance(source, MethodType):  # which may call others of its class
        source = type(source.__self__)
    text = ""
    if not _is_own(code):
        with suppress(OSError, TypeError):  # Python does not know it
            text = inspect.getsource(source)
    return _hash(text.encode())


def _named(code: Any) -> Any:
    """Return what has the name of user code: the function of a partial application, or the class of an object."""
    while isinstance(code, partial):
        code = code.func
    return code if hasattr(code, "__qualname__") else type(code)


def _name_of(code: Any) -> str:
    """Return the name of user code with that of its module."""
    return f"{_label_of(_named(code).__module__)}.{_named(code).__qualname__}"


def _is_own(code: Any) -> bool:
    """Return whether code is of this package, which has a version."""
    return str(_named(code).__module__).startswith(("tokenrl.", "toy_tasks."))


def _hash(text: bytes) -> str:
    return sha256(text).hexdigest()[:12]


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that decide the numbers of a run.

    So does the processor: with another one PyTorch may choose instructions that round differently.
    """
    info = Path("/proc/cpuinfo")
    processor = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    by_name = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "tokenrl": import_module("tokenrl").__version__,
        "processor": processor[1] if processor else platform.processor() or platform.machine(),
    }
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            by_name[package] = metadata.version(package)
    return by_name
