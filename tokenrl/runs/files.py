"""Files that are written whole: a reader sees the old file or the new one, never a part of it.

JSON written here is strict: JSON has no NaN and no infinity, so NaN becomes null (a number that is missing),
and an infinity becomes the string "Infinity" or "-Infinity", which `float` reads back.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from tokenrl.errors import Stopped


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a hidden file beside `path` to write to, which takes the place of `path` when the block ends well.

    What cannot be replaced, a pipe or a terminal such as /dev/stdout, is written to as it is.

    Raises:
        Stopped: it could not be written (disk full, no permission); the old file, if any, is untouched.
    """
    stream = path.is_fifo() or path.is_char_device()
    partial = path if stream else path.with_name(f".{path.name}.partial")
    try:
        yield partial
        if not stream:
            sync_file(partial)
            os.replace(partial, path)
            sync_folder(path.parent)
    except OSError as error:
        raise Stopped(
            f"{path} could not be written ({error}); free space or permissions and run again."
        ) from error
    finally:
        if not stream:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8; what has no UTF-8, a lone surrogate, becomes a question mark.

    Raises:
        Stopped: as `replacing`.
    """
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON with sorted keys.

    Raises:
        Stopped: as `replacing`.
    """
    text = json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def plain(value: Any) -> Any:
    """Turn a value into what strict JSON can hold.

    NaN becomes None, an infinity its name; tensors and numpy values become numbers or lists, dataclasses
    dicts, sets sorted lists, a function its "module:name", and anything else its `str`.
    """
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, str):  # a lone surrogate has no UTF-8
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return None if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((plain(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "tolist"):  # numpy and torch, of any rank
        return plain(value.tolist())
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return str(value)


def sync_file(path: Path) -> None:
    """Make the content of a file survive a power cut."""
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can sync a folder at all."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
