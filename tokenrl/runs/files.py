"""Writes files whole: a reader sees the old file or the new one, never a part of it.

JSON has no NaN and no infinity. NaN is therefore written as null (a missing number), and an infinity as the
string "Infinity" or "-Infinity", which `float` reads back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from tokenrl.errors import Refused, Stopped, describe


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden file beside `path`, which replaces `path` when the block ends without an error.

    A pipe or a terminal, such as /dev/stdout, cannot be replaced; then `path` itself is yielded.

    Raises:
        Stopped: the file could not be written (disk full, no permission); an old file is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.is_fifo() or path.is_char_device():
            yield path
            return
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with suppress(OSError):  # a name too long, a folder that is gone
            partial.unlink(missing_ok=True)


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written for its name, before the work whose result it shall hold.

    Raises:
        Refused: its folder does not exist, or it is a folder itself.
    """
    place = Path(path).absolute()
    if not os.path.isdir(place.parent):
        raise Refused(f"{path} cannot be written: its directory does not exist. Make it first.")
    if os.path.isdir(place):
        raise Refused(f"{place} cannot be written: it is a directory. Give the name of a file in it.")


def not_written(path: Path, error: Exception) -> Stopped:
    """Return the error for a file or folder that could not be written, with what helps."""
    mend = "Free space there, change the permissions, or write to another place."
    if isinstance(error, FileNotFoundError) or not path.parent.is_dir():
        mend = "It or its folder was removed or moved; leave a run's directory alone until the run has ended."
    return Stopped(f"{path} could not be written ({describe(error)}). {mend}")


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8. A lone surrogate, which UTF-8 cannot hold, becomes a question mark.

    Raises:
        Stopped: the file could not be written; see `replacing`.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON with sorted keys.

    Raises:
        Stopped: the file could not be written; see `replacing`.
    """
    text = json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def plain(value: Any) -> Any:
    """Convert a value to what strict JSON can hold.

    NaN becomes None and an infinity its name. Tensors and numpy values become numbers or lists, dataclasses
    become dicts, sets sorted lists, a function its "module:name", and anything else its `str`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):  # UTF-8 cannot hold a lone surrogate
        return value.encode("utf-8", "replace").decode("utf-8")
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, of any rank
        return plain(value.tolist())
    return f"{value.__module__}:{value.__qualname__}" if hasattr(value, "__qualname__") else str(value)


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return settings as numbers and texts by names such as `estimator.baseline`; a list becomes JSON."""
    found: dict[str, Any] = {}
    for key, value in plain(settings).items():
        if isinstance(value, dict):
            found |= flat(value, f"{before}{key}.")
        else:
            found[before + key] = json.dumps(value) if isinstance(value, list) else value
    return found


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that it survives a power failure; not on Windows."""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
