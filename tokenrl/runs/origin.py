"""Records how a run was started: its command, its settings, and the versions of what it depends on."""

from __future__ import annotations

import inspect
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from tokenrl.names import source_file
from tokenrl.runs.files import plain

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


def code_of(settings: Mapping[str, Any], objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return hashes of the user's code, so that it can be compared: of objects by setting, of modules by name.

    Args:
        settings: the settings of a run.
        objects: the rewards and the environment of its task, by these names, if they count.
    """
    held = {name: objects.get(name) for name in ("reward", "environment")}
    held |= {name: settings.get(name) for name in ("estimator", "teacher_context")}
    return {**plain(held, _with_hash), **module_hashes()}


def module_hashes(recorded: Iterable[str] = ()) -> dict[str, str]:
    """Return a hash of each module of the user that this process has imported, by `module NAME`.

    Those of Python, of installed packages and of this one do not count, nor does the program itself, which may
    start a run with other settings. A module that is imported inside a function counts once the function has
    been called. One that another process imports, as that of rewards with a deadline, is not seen.

    Args:
        recorded: names of hashes of an earlier process; their modules count too, imported or not.
    """
    hashes = {}
    for name in sorted({*sys.modules, *(name.removeprefix("module ") for name in recorded)}):
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


def _with_hash(value: Any) -> str:
    """Return the name of a function, or of the class of an object, with a hash of its source."""
    function = getattr(value, "func", value)  # of a partial application
    if not hasattr(function, "__qualname__"):
        function = type(function)
    source = ""
    if not str(function.__module__).startswith(("tokenrl.", "toy_tasks.")):  # which have versions
        with suppress(OSError, TypeError):  # Python does not know it
            source = inspect.getsource(function)
    return f"{function.__qualname__} {_hash(source.encode())}"


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
