"""Records how a run was started: its command, its settings, and the versions of what it depends on."""

from __future__ import annotations

import inspect
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache, partial
from hashlib import sha256
from importlib import import_module, metadata
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

from tokenrl.configuration import values_of_code
from tokenrl.errors import USER_CODE_FAILED
from tokenrl.files import plain
from tokenrl.names import NamedFunction, original, source_file

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
    for setting, _, value in values_of_code(kind, {**settings, **objects}):
        is_text = isinstance(value, str) and not isinstance(value, NamedFunction)
        if is_text or value is None:
            continue
        label = f"{setting} {_named(value).__module__}.{name_of(value)}"
        if isinstance(value, NamedFunction):
            label = f"{setting} {value}"
            value = value.load()
        while label in code:  # as of two functions without a name
            label += "'"
        code[label] = value
    return code


def hashes_of_code(code: Mapping[str, Any]) -> dict[str, str]:
    """Return the hashes of all code of the user: of modules, of functions and objects, and of their values."""
    sources = {label: _hash(_source(thing)) for label, thing in code.items()}
    values = {name: hash_of_value(value) for name, value in held_values(code).items()}
    return module_hashes() | sources | values


def held_values(code: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that functions and objects of the user hold beside their source.

    These are the values of closures, defaults, partial applications and attributes. An object with a state_dict
    holds none: what it says is its state is no code.
    """
    values = dict[str, Any]()
    for label, thing in code.items():
        with suppress(*USER_CODE_FAILED):  # objects may compute attributes
            values |= {f"{label} {name}": value for name, value in _values_of(thing).items()}
    return values


def _values_of(code: Any) -> dict[str, Any]:
    """Return the values that a function or an object of the user holds, by name."""
    if isinstance(code, partial):
        return {**_values_of(code.func), "args": code.args, **code.keywords}
    if isinstance(code, MethodType):
        return _values_of(code.__self__)
    if isinstance(code, type) or hasattr(code, "state_dict") or _is_own(code):
        return {}
    values = dict(getattr(code, "__dict__", {}))
    if isinstance(code, FunctionType):
        values |= inspect.getclosurevars(code).nonlocals
        values["defaults"] = code.__defaults__, code.__kwdefaults__
    return values


def hash_of_value(value: Any, above: tuple[int, ...] = ()) -> str:
    """Return a hash that equal values share in every process; what has no form of JSON counts by its type.

    Args:
        value: the value.
        above: the ids of the functions that hold it.
    """
    text = type(value).__qualname__
    # Objects may compute attributes, and a list may be a part of itself.
    with suppress(*USER_CODE_FAILED):
        text = json.dumps(plain(value, partial(_text_of, above=above)), sort_keys=True)
    return _hash(text.encode())


def _text_of(thing: Any, above: tuple[int, ...]) -> str:
    """Return a hash of an array, of the source and the values of a function, or else the name of a type."""
    if hasattr(thing, "tolist"):
        array = thing.detach().cpu().double().numpy() if hasattr(thing, "detach") else thing
        if array.dtype.hasobject:
            return hash_of_value(array.tolist(), above)
        return f"{array.shape} {_hash(array.tobytes())}"
    is_code = isinstance(thing, FunctionType | MethodType | partial | type)
    if is_code and id(thing) not in above:
        values = hash_of_value(_values_of(thing), (*above, id(thing)))
        return f"{name_of(thing)} {_hash(_source(thing))} {values}"
    return name_of(thing)


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
        module = sys.modules.get(name)
        path = str(vars(module).get("__file__") if module else source_file(name))
        # Texts, since a process has imported thousands of modules, and each checkpoint asks for all of them.
        is_foreign = path.startswith(_PYTHON) or _INSTALLED.search(path)
        if name.partition(".")[0] in _NOT_HASHED or is_foreign:
            continue
        if (file := Path(path)).is_file():
            # A file is imported under a hash of its path if its name is that of another module.
            label = file.stem if name.startswith("tokenrl_file_") else name
            hashes[f"module {label}"] = _hash(file.read_bytes())
    return hashes


def _source(code: Any) -> bytes:
    """Return the source of a function, or of the class of a method or an object; empty where nothing knows it."""
    source = _named(code)
    if isinstance(source, MethodType):  # which may call others of its class
        source = type(source.__self__)
    with suppress(OSError, TypeError):
        return b"" if _is_own(code) else inspect.getsource(source).encode()
    return b""


def name_of(code: Any) -> str:
    """Return the name of a function, also of a partial application of it, or of the class of an object."""
    return str(_named(code).__qualname__)


def _named(code: Any) -> Any:
    function = original(code)
    return function if hasattr(function, "__qualname__") else type(function)


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
