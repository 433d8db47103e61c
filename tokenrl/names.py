"""Imports an object by its name, given as `package.module:attribute` or `path/to/file.py:attribute`.

A `NamedFunction` is such a name that can be called; its function is imported when it is first called.
The packages of tokenrl use `lazily`, which imports each of their public names when it is first used.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.machinery import PathFinder
from inspect import signature
from pathlib import Path
from typing import Any

from tokenrl.errors import USER_CODE_FAILED, Refused, describe, suggest
from tokenrl.user_code import user_code

OWN_MODULES: dict[str, tuple[Path, bytes]] = {}
"""The modules of files that were imported here, and of those beside them that they imported: the file of each,
and what stood in it."""


def source_of(spec: str) -> str:
    """Return the module or the file that a name of an object names; empty without a colon."""
    return spec.rpartition(":")[0]


@dataclass(frozen=True, eq=False)
class NamesCode:
    """Metadata of a field whose texts may name code of the user, as `module:name` or `file.py:name`.

    What every such field owes follows from it: code that a stranger's run names is not executed, and code that
    has changed is not continued or compared.

    Attributes:
        source: returns, for a text, the module or the file that the field's own loader would import; empty if
            it would import none. The loader asks it too.
    """

    source: Callable[[str], str] = source_of


def original(function: Any) -> Any:
    """Return the function that a partial application was made of, or the function itself."""
    while isinstance(function, partial):
        function = function.func
    return function


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


def accepted(
    function: Callable[..., Any],
    subject: str,
    available: Mapping[str, Any],
    unsuggested: Collection[str] = (),
) -> list[str]:
    """Return the names among `available` that a function has parameters for: all if it takes **kwargs.

    Args:
        function: the function, which gets them by keyword.
        subject: what messages call it.
        available: what can be passed, by name.
        unsuggested: those names that a message does not suggest.

    Raises:
        Refused: a parameter without a default is not among them, or cannot be passed by keyword.
    """
    try:
        parameters = signature(function).parameters.values()
    except ValueError:  # some builtins and extension types have no signature
        return list(available)
    names: list[str] = []
    for p in parameters:
        if p.kind is p.VAR_KEYWORD:
            names += available
        elif p.kind is not p.VAR_POSITIONAL:
            names.append(p.name)
            can_be_passed = p.name in available and p.kind is not p.POSITIONAL_ONLY
            if p.default is p.empty and not can_be_passed:
                problem = "that is no column of the data, or that cannot be passed by keyword"
                hint = suggest(p.name, {*available} - {*unsuggested})
                hint += " Rename it, or give it a default."
                raise Refused(f"{subject} has a parameter '{p.name}' {problem}.{hint}")
    return [name for name in available if name in names]


def import_attribute(spec: str, purpose: str) -> Any:
    """Import `package.module:name` or `path/to/file.py:name`; the current directory is importable.

    Args:
        spec: the module (or .py file) and the attribute, joined by a colon; the attribute may have dots.
        purpose: what the object is for ("task", "reward"), for the error message.

    Raises:
        Refused: the module, the file or the attribute does not exist, or importing it raised an error.
    """
    source, attribute = source_of(spec), spec.rpartition(":")[2]
    if not source or not attribute:
        hint = ""
        with suppress(OSError):
            names = re.findall(
                r"(?m)^(?:async )?(?:def|class) ([a-zA-Z]\w*)", Path(spec).read_text()
            )
            hint = f" The file defines {', '.join(names)}."
        raise Refused(
            f"{purpose} '{spec}': expected module:attribute or path/to/file.py:attribute.{hint}"
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
    share its classes and tables. Once one has changed, all are executed anew, since the others may hold parts
    of it.

    Args:
        source: the module, which is installed or lies in the current directory, or the file.
        whose: what the import is for, with which an error message begins.

    Raises:
        Refused: the module or the file does not exist, or importing it raised an error.
    """
    file = Path(source).resolve() if source.endswith(".py") else None
    if file is not None and not file.is_file():
        raise Refused(f"{whose}: there is no file {source}; give its path from {Path.cwd()}.")
    modules = OWN_MODULES.values()
    if not all(path.is_file() and path.read_bytes() == content for path, content in modules):
        for name in OWN_MODULES:
            sys.modules.pop(name, None)
        OWN_MODULES.clear()
    folder = file.parent if file else Path.cwd()
    before = {*sys.modules}
    # The folder stands first in sys.path during the import, so that a user's file wins over an installed
    # module of the same name. Afterwards it stands last: imports that the file makes later still work, and
    # it cannot hide a package that tokenrl imports later. Byte code is not written, as it could hide changes.
    sys.path.insert(0, str(folder))
    writes_none = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        with user_code():
            return _import_file(file) if file else importlib.import_module(source)
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
            path = Path(str(getattr(sys.modules[name], "__file__", None)))
            if path.parent == folder:
                OWN_MODULES[name] = path, path.read_bytes()


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


def _import_file(file: Path) -> Any:
    """Import a file by its own name, as other files do, or if that is another module's by a hash of its path."""
    name = file.stem
    installed = PathFinder.find_spec(name, sys.path[1:])
    owner, _ = OWN_MODULES.get(name, (file, b""))
    foreign = {*sys.stdlib_module_names, *sys.modules} - OWN_MODULES.keys()
    if name in foreign or owner != file or (installed and installed.origin != str(file)):
        name = "tokenrl_file_" + hashlib.sha256(str(file).encode()).hexdigest()[:16]
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
    `tokenrl/signatures.pyi`; the import in the branch `else` says where these are at run time. What the stub lists
    below a string is for other rooms of tokenrl, and `__dir__` leaves it out.

    Args:
        package: name of the package.
    """
    stub = Path(str(sys.modules[package].__file__)).with_suffix(".pyi")
    statements = ast.parse(stub.read_text(encoding="utf-8")).body
    end = next((n for n, part in enumerate(statements) if isinstance(part, ast.Expr)), None)
    homes = _homes(statements)
    public = _homes(statements[:end])

    def __getattr__(name: str) -> Any:
        if name not in homes:
            names = ", ".join(sorted(public))
            raise AttributeError(f"module {package!r} has no attribute {name!r}; it has {names}")
        home = importlib.import_module(homes[name])
        # a module inside a package, its attribute only once it is imported
        if not hasattr(home, name):
            return importlib.import_module(f"{homes[name]}.{name}")
        return getattr(home, name)

    return __getattr__, lambda: sorted(public)


def _homes(statements: Sequence[ast.stmt]) -> dict[str, str]:
    """Return the modules from which statements of a stub import names, by the name."""
    return {
        name.name: str(part.module)
        for statement in statements
        for part in ast.walk(statement)
        if isinstance(part, ast.ImportFrom)
        for name in part.names
    }
