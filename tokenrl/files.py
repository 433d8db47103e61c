"""Writes files and folders whole: a reader sees the old one or the new one, never a part of it.

Checkpoints, models, warm starts and comparisons are folders that are hashed too: they are written into a
hidden folder beside their place, which is synced to the disk, hashed, and renamed last. The hashes stand in
its manifest.json, {name: [size, SHA-256]}, by which a reader notices damaged files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from tokenrl.errors import (
    Refused,
    Stopped,
    TokenrlError,
    describe,
    is_special,
    is_stream,
    read_file,
    written,
)
from tokenrl.user_code import own_process

State = dict[str, Any]
"""What a part of a run saves: dicts and lists of plain values, tensors and arrays."""
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
PLAIN_JSON = json.JSONEncoder(sort_keys=True, allow_nan=False)
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Flags with which a link is no way to another file, and nothing waits for the reader of a pipe."""
UNSYNCED = ("EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF", "EACCES", "EPERM")
"""Errors of a flush that a system does not offer, as for the folders of some network mounts."""


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new hidden file beside `path`, which replaces `path` when the block ends without an error.

    A link, a pipe or a file of an earlier crash in the place of either is replaced too, and nothing is written
    through it. A stream of this process, such as /dev/stdout, is written to as it is.

    Raises:
        Stopped: the file could not be written (disk full, no permission); an old file is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            if is_stream(path):
                with path.open("ab") as file:
                    yield file
                return
            remove(partial)
            with partial.open("xb") as file, own_process():
                yield file
            sync(partial)
            os.replace(partial, path)
            sync(path.parent)
    finally:
        with suppress(OSError):  # a name too long, a folder that is gone
            partial.unlink(missing_ok=True)


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a file that cannot be written, before the work whose result it shall hold: it is tried.

    Raises:
        Refused: its folder does not exist or cannot be written, or it is a folder itself, or a pipe or a device
            that is no stream of this process.
    """
    target = Path(path).absolute()
    try:
        if target.is_dir() or is_special(target):
            raise OSError("it is a directory, a pipe or a device")
        with suppress(EOFError), replacing(target):
            raise EOFError  # so that nothing is replaced
    except (OSError, ValueError, Stopped) as error:
        raise Refused(
            f"{target} cannot be written ({describe(error.__cause__ or error)}). Give the name of a file in a "
            "directory that exists, or /dev/stdout."
        ) from error


OutputFile = Annotated[str, check_place]
"""The type of a setting that names a file to write, which is tried where the setting is made."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise `Stopped`, which names the path, for an error of the system in the block."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: Exception) -> Stopped:
    """Return the error for a file or folder that could not be written, with what helps."""
    return Stopped(
        f"{path} could not be written ({describe(error)}). Free space there, change the permissions, or write to "
        "another place, and leave a run's directory where it is until the run has ended."
    )


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8. A lone surrogate, which UTF-8 cannot hold, becomes a question mark.

    Raises:
        Stopped: the file could not be written; see `replacing`.
    """
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write strict JSON with sorted keys.

    Raises:
        Stopped: the file could not be written; see `replacing`.
    """
    text = json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def plain(value: Any, write: Callable[[Any], str] | None = None) -> Any:
    """Convert a value to what strict JSON can hold.

    NaN becomes None and an infinity its name. Tensors and numpy values become numbers or lists, dataclasses
    become dicts, sets sorted lists, a function its "module:name", and anything else its `str`.

    Args:
        value: the value.
        write: writes tensors, numpy values, functions and other objects in another way.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):  # UTF-8 cannot hold a lone surrogate
        return value.encode("utf-8", "replace").decode("utf-8")
    if is_dataclass(value) and not isinstance(value, type):
        value = {part.name: getattr(value, part.name) for part in fields(value)}
    if isinstance(value, Mapping):
        names = (key if isinstance(key, str) else _name(key) for key in value)
        return dict(zip(names, (plain(item, write) for item in value.values()), strict=True))
    if isinstance(value, set | frozenset):
        return sorted((plain(item, write) for item in value), key=str)
    if isinstance(value, list | tuple):
        return [plain(item, write) for item in value]
    if hasattr(value, "tolist") and write is None:  # numpy and torch, of any rank
        return plain(value.tolist())
    return (write or _name)(value)


def _name(value: Any) -> str:
    """Return a name that the same object has in each process, so none with its address."""
    is_named = hasattr(value, "__qualname__")
    name = f"{value.__module__}:{value.__qualname__}" if is_named else written(value, str)
    return ADDRESS.sub("", name)


def canonical(value: Any) -> str:
    """Return JSON that equal values share in every process, also where JSON has no form for them.

    Sets have no order of their own, and the text of an object without a `__repr__` holds its address in
    memory, which is left out.
    """
    with suppress(TypeError, ValueError):  # JSON has a form for most data, and writes it faster
        return PLAIN_JSON.encode(value)
    return json.dumps(plain(value), sort_keys=True)


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return settings as numbers and texts by names such as `estimator.baseline`; a list becomes JSON."""
    flattened: dict[str, Any] = {}
    for key, value in plain(settings).items():
        if isinstance(value, dict):
            flattened |= flat(value, f"{before}{key}.")
        else:
            flattened[before + key] = json.dumps(value) if isinstance(value, list) else value
    return flattened


def appending(path: Path) -> BinaryIO:
    """Open a file of a folder, or a new one, to append to it; never through a link.

    Raises:
        OSError: a link or a pipe lies there, or nothing can be written.
    """
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags | NO_FOLLOW, 0o666))


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk, so that it survives a power failure; not on Windows.

    Where the system cannot flush it, what was written counts as written.
    """
    if os.name == "nt":
        return
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) not in UNSYNCED:
            raise


MANIFEST = "manifest.json"
TRAINED_PROMPTS = "trained_prompts.txt"
"""Beside weights: hashes of the prompts that they were trained on, and of their questions, one in a line."""
_FREE = ("README.md", TRAINED_PROMPTS)
"""What is in no manifest, as people edit the card of a model, or remove the hashes, before they share it."""


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Yield a hidden empty folder, which becomes `directory` when the block ends without an error.

    A crash at any moment leaves the old folder or the new one; between two renames the old one is hidden, and
    `recover` brings it back. Only one process may write there.

    Args:
        directory: the folder to make or to replace. Its parent is made if absent, but not those above.

    Raises:
        Stopped: the block failed or the disk is full; an old folder is unchanged.
    """
    aside, old = _beside(directory)
    try:
        directory.parent.mkdir(exist_ok=True)
        recover(directory)
        aside.mkdir()
        with own_process():
            yield aside
        _seal(aside)
        if directory.exists():
            os.rename(directory, old)
        os.rename(aside, directory)
        sync(directory.parent)
        sync(directory.parent.parent)  # which may have got the parent only now
    except TokenrlError:
        raise
    except Exception as error:  # on a full disk, tokenizers raises a bare Exception
        raise not_written(directory, error) from error
    finally:
        with suppress(OSError):
            recover(directory)


@contextmanager
def trial_directory(directory: Path) -> Iterator[Path]:
    """Yield a hidden empty folder beside `directory`, and remove it; after a crash `recover` does."""
    aside, _ = _beside(directory)
    try:
        with writing(directory):
            recover(directory)
            aside.mkdir()
        yield aside
    finally:
        with suppress(OSError):
            recover(directory)


def recover(directory: Path) -> None:
    """Bring back the folder that an interrupted `atomic_directory` had hidden, and remove what it left."""
    aside, old = _beside(directory)
    if old.exists() and not directory.exists():
        os.rename(old, directory)
    remove(aside)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def verify(folder: Path) -> None:
    """Check that a folder holds the files that its manifest names, unchanged; other files do not count.

    Raises:
        Refused: the manifest or a file is missing, altered or cut short; the message names it.
    """
    for name, entry in (_manifest(folder) or {MANIFEST: None}).items():
        with suppress(OSError, ValueError):  # a null byte in a name
            if _entry(folder / name) == entry:
                continue
        raise Refused(
            f"The folder {folder} cannot be used: its file {name} is missing, altered or cut short. Use another "
            f"copy or an earlier checkpoint; unverified it loads from a copy without {MANIFEST}."
        )


def model_directory(name_or_path: str | Path) -> str | Path:
    """Return where a model lies: `model/` for a run directory, else the path or hub name itself.

    A folder with a manifest, or inside of one, is verified. Others pass, since nothing says what they should
    hold, unless they hold a pipe, for which a reader would wait without end.

    Raises:
        Refused: the folder is damaged, it holds a pipe or a device, or it lies where a checkpoint should be and
            is none.
    """
    model = name_or_path
    run = Path(name_or_path)
    if os.path.exists(run / "metrics.jsonl") and os.path.isdir(run / "model"):
        model = run / "model"
    if os.path.isdir(model):
        path = Path(model).resolve()
        for file in filter(is_special, path.iterdir()):
            raise Refused(
                f"{file} is a pipe or a device, and only regular files are read. Remove it."
            )
        for folder in (path, path.parent):
            if folder.match("checkpoints/step_*") or _manifest(folder) is not None:
                verify(folder)
    return model


def _seal(folder: Path) -> None:
    """Sync a folder with all that is in it to the disk, and write its manifest last; links are no part of it."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            continue
        if path.suffix == ".safetensors":  # which makes files of mode 600
            path.chmod(folder.stat().st_mode & 0o666)
        sync(path)
        if path.is_file() and path.name not in _FREE:
            files[path.relative_to(folder).as_posix()] = _entry(path)
    write_json(folder / MANIFEST, files)
    sync(folder)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """Return the entries of a manifest: {} of a damaged one, None without one or with another program's."""
    try:
        entries = json.loads(read_file(folder / MANIFEST))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    is_ours = any(isinstance(entry, list) and len(entry) == 2 for entry in entries.values())
    return entries if is_ours or not entries else None


def _entry(file: Path) -> list[Any]:
    """Return the size of a file and its SHA-256."""
    if is_special(file):
        raise OSError("it is a pipe or a device")
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return [file.stat().st_size, digest.hexdigest()]


def _beside(directory: Path) -> tuple[Path, Path]:
    """Return the hidden folders beside a folder for what will replace it and for what it replaces."""
    return directory.with_name(f".{directory.name}.partial"), directory.with_name(
        f".{directory.name}.old"
    )
