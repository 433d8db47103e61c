"""Imports by name: `package.module:attribute` or `path/to/file.py:attribute`, as a user writes them.

`lazily` serves the packages of tokenrl themselves: their public names are imported when they are first used.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, describe, suggest

FILE_MODULE = "tokenrl_file_"


def import_attribute(spec: str, what: str) -> Any:
    """Import `package.module:name` or `path/to/file.py:name`; the current directory is importable.

    Args:
        spec: module (or .py file) and attribute, joined by a colon; the attribute may be dotted.
        what: what the caller looks for ("task", "reward"), for the error message.

    Raises:
        Refused: no such module or file, an error while importing it, or no such attribute.
    """
    source, _, attribute = spec.rpartition(":")
    if not source or not attribute:
        raise Refused(f"{what} '{spec}': expected module:attribute or path/to/file.py:attribute.")
    file = Path(source) if source.endswith(".py") else None
    if file is not None and not file.is_file():
        raise Refused(f"{what} '{spec}': there is no file {source}; give its path from {Path.cwd()}.")
    folder = str(file.resolve().parent if file else Path.cwd())
    # In front during the import, so that a user's file wins over an installed namesake; at the end
    # afterwards, so that its own late imports still work and it cannot shadow a package that we import later.
    sys.path.insert(0, folder)
    try:
        module = import_file(file) if file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ModuleNotFoundError) and source.split(".")[0] == error.name
        reason = f"there is no module {source}" if missing else f"importing it raised {describe(error)}"
        raise Refused(
            f"{what} '{spec}': {reason}. The module has to be installed or lie in {folder}."
        ) from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    found = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
            raise Refused(f"{what} '{spec}': {source} has no {part}.{suggest(part, names)}")
        found = getattr(found, part)
    return found


def import_file(file: Path) -> Any:
    """Import a file as a module named after its absolute path, without dots: pickle then finds it again."""
    name = FILE_MODULE + hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their own module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # as the import statement does: what failed is not there
        raise
    return module


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package whose public names are imported when first used.

    The names stand once, as the imports of the `__init__.pyi` beside the package's `__init__.py`, where type
    checkers read them too.

    Args:
        package: name of the package.
    """
    stub = Path(str(sys.modules[package].__file__)).with_suffix(".pyi")
    homes = {
        name.name: str(statement.module)
        for statement in ast.parse(stub.read_text(encoding="utf-8")).body
        if isinstance(statement, ast.ImportFrom)
        for name in statement.names
    }

    def __getattr__(name: str) -> Any:
        if name not in homes:
            known = ", ".join(sorted(homes))
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {known}")
        home = importlib.import_module(homes[name])
        # The name of a module inside a package is its attribute only once it has been imported.
        return (
            getattr(home, name) if hasattr(home, name) else importlib.import_module(f"{homes[name]}.{name}")
        )

    return __getattr__, lambda: sorted(homes)
