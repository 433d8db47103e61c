"""Imports an object by its name, given as `package.module:attribute` or `path/to/file.py:attribute`.

A `NamedFunction` is such a name that can be called; its function is imported when it is first called.
The packages of tokenrl use `lazily`, which imports each of their public names when it is first used.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from tokenrl.errors import USER_CODE_FAILED, Refused, describe, own_process, suggest

BEGAN = time.time()
"""When the program began, in seconds of the clock."""
OWN_MODULES: dict[str, tuple[Path, bytes | None]] = {}
"""The modules of files that were imported here, and of those beside them that they imported: the file of each, and
what stood in it."""


class NamedFunction(str):
    """The name of a function, as text that can be called.

    It is written to files and compared as the text that it is, and another process to which it is sent
    imports the function again.

    Example:
        >>> NamedFunction("math:sqrt")(4.0)
        2.0
    """

    _found: Callable[..., Any] | None = None

    @property
    def __name__(self) -> str:
        """The text, by which messages name the function."""
        return str(self)

    def load(self) -> Callable[..., Any]:
        """Return the function, which is imported when it is first asked for.

        Raises:
            Refused: it cannot be imported (see `import_attribute`), or it is nothing that can be called.
        """
        function = self._found or import_attribute(str(self), "function")
        if not callable(function):
            raise Refused(f"function '{self}' is a {type(function).__name__}; name a function.")
        self._found = function
        return function

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call the function."""
        return self.load()(*args, **options)

    def __reduce__(self) -> tuple[type[NamedFunction], tuple[str]]:
        return NamedFunction, (str(self),)


def import_attribute(spec: str, purpose: str) -> Any:
    """Import `package.module:name` or `path/to/file.py:name`; the current directory is importable.

    Args:
        spec: the module (or .py file) and the attribute, joined by a colon; the attribute may have dots.
        purpose: what the object is for ("task", "reward"), for the error message.

    Raises:
        Refused: the module, the file or the attribute does not exist, or importing it raised an error.
    """
    source, _, attribute = spec.rpartition(":")
    if not source or not attribute:
        raise Refused(
            f"{purpose} '{spec}': expected module:attribute or path/to/file.py:attribute."
        )
    value = import_source(source, f"{purpose} '{spec}'")
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = [name for name in dir(value) if not name.startswith("_")]
            raise Refused(f"{purpose} '{spec}': {source} has no {part}.{suggest(part, names)}")
        value = getattr(value, part)
    return value


def import_source(source: str, whose: str) -> Any:
    """Import a module by its name, or a file by its path, which ends in .py; the module is returned.

    A file is executed once, however it is named, and also if another file imports it, so that all of a run
    share its classes and tables. Once a file has changed, all of `OWN_MODULES` are executed anew, since those
    that stayed as they were may hold parts of it.

    Args:
        source: the module, which is installed or lies in the current directory, or the file.
        whose: what the import is for, with which an error message begins.

    Raises:
        Refused: the module or the file does not exist, or importing it raised an error.
    """
    file = Path(source).resolve() if source.endswith(".py") else None
    if file is not None and not file.is_file():
        raise Refused(f"{whose}: there is no file {source}; give its path from {Path.cwd()}.")
    if any(_content(path) != content for path, content in OWN_MODULES.values()):
        for name in OWN_MODULES:
            sys.modules.pop(name, None)
        OWN_MODULES.clear()
    folder = file.parent if file else Path.cwd()
    name = _module_name(file) if file else source
    before = {*sys.modules}
    # The folder stands first in sys.path during the import, so that a user's file wins over an installed
    # module of the same name. Afterwards it stands last: imports that the file makes later still work, and
    # it cannot hide a package that tokenrl imports later. Byte code is not written, as it could hide changes.
    sys.path.insert(0, str(folder))
    writes_none = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        with own_process():
            return _import_file(file, name) if file else importlib.import_module(name)
    except USER_CODE_FAILED as error:
        missing = isinstance(error, ModuleNotFoundError) and source.split(".")[0] == error.name
        reason = (
            f"there is no module {source}" if missing else f"importing it raised {describe(error)}"
        )
        hint = (
            f" Modules are installed or lie in {folder}." if isinstance(error, ImportError) else ""
        )
        raise Refused(f"{whose}: {reason}.{hint}") from error
    finally:
        sys.dont_write_bytecode = writes_none
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
        for name in sys.modules.keys() - before:
            path = _file_of(name)
            if path.parent == folder.resolve():
                OWN_MODULES[name] = path, _content(path)


def source_file(source: str) -> Path | None:
    """Return the file that `import_source` would execute; nothing is imported, also no package around it.

    Args:
        source: a module by its name, or a file by its path, which ends in .py.

    Returns:
        The file, with links as they are; None if there is none, or Python alone can say which it is.
    """
    if source.endswith(".py"):
        return Path(source) if Path(source).is_file() else None
    package, *inner = source.split(".")
    try:
        spec = PathFinder.find_spec(package, [str(Path.cwd())]) or importlib.util.find_spec(package)
        for name in inner:
            package = f"{package}.{name}"
            spec = spec and PathFinder.find_spec(package, spec.submodule_search_locations or [])
    except (ImportError, ValueError):  # a module without a specification, such as __main__
        return None
    return Path(str(spec.origin)) if spec is not None and spec.has_location else None


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _file_of(module: str) -> Path:
    """Return the file of a module in `sys.modules`."""
    return Path(getattr(sys.modules[module], "__file__", None) or "").resolve()


def _module_name(file: Path) -> str:
    """Return the name of the module of a file: its own, by which others import it, or else a hash of its path.

    Its own may be taken, or be that of an installed module. A module that the program itself imported counts
    as that of the file only if the file has not changed since the program began.
    """
    is_old = file.stat().st_mtime < BEGAN
    for name in (file.stem, "__main__"):
        if name in sys.modules and _file_of(name) == file and (is_old or name in OWN_MODULES):
            return name
    if file.stem.isidentifier() and file.stem not in sys.modules:
        spec = importlib.util.find_spec(file.stem)
        if spec is None or Path(spec.origin or "").resolve() == file:
            return file.stem
    return "tokenrl_file_" + hashlib.sha256(str(file).encode()).hexdigest()[:16]


def _import_file(file: Path, name: str) -> Any:
    """Import a file as a module of a name; it is executed unless it has been."""
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for the module that defines it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # as the import statement does after an error
        raise
    return module


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make `__getattr__` and `__dir__` of a package so that each public name is imported when first used.

    The public names are listed once, as the imports of the `__init__.pyi` beside the package's `__init__.py`,
    and type checkers read them there too. Of functions whose keywords are settings they see the signatures in
    `tokenrl/signatures.pyi`; the import in the branch `else` says where these are at run time.

    Args:
        package: name of the package.
    """
    stub = Path(str(sys.modules[package].__file__)).with_suffix(".pyi")
    homes = {
        name.name: str(statement.module)
        for statement in ast.walk(ast.parse(stub.read_text(encoding="utf-8")))
        if isinstance(statement, ast.ImportFrom)
        for name in statement.names
    }

    def __getattr__(name: str) -> Any:
        if name not in homes:
            public = ", ".join(sorted(homes))
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {public}")
        home = importlib.import_module(homes[name])
        # a module inside a package, its attribute only once it is imported
        if not hasattr(home, name):
            return importlib.import_module(f"{homes[name]}.{name}")
        return getattr(home, name)

    return __getattr__, lambda: sorted(homes)
