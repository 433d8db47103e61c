"""Folders of this repository, and files that tests write into others or read there."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"


def read_json(path: str | Path) -> Any:
    """The value in a file, such as the settings of a run in its config.json."""
    return json.loads(Path(path).read_text())


def write_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Write rows of data, one to a line."""
    Path(path).write_text("\n".join(map(json.dumps, rows)))
