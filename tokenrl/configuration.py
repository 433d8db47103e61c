"""Reads settings from files: the config.json of a run, or settings in JSON or YAML. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.errors import Refused
from tokenrl.settings import arguments, check

T = TypeVar("T")

RECORDED = (
    *("kind", "versions", "title", "solved", "horizon", "pairs", "command"),
    *("chat_prompts", "task_rows", "warm_started"),
)
"""Names in the config.json of a run that are no settings."""


def configured(kind: type[T], path: str | os.PathLike[str], command: str, *, anew: bool = False) -> T:
    """Make a dataclass of settings from a file: a run's config.json, or settings in JSON or YAML.

    Args:
        kind: The dataclass of settings to make.
        path: The file, or the directory of a run.
        command: The command that uses the settings; a run's config.json names its own command as its `kind`.
        anew: Whether the settings are for a new run, which does not take the output_dir of a run's
            config.json. Otherwise flags decide whether a run is continued or replaced, not the file.

    Raises:
        Refused: The file cannot be read, belongs to another command, or has a setting that is not allowed.
    """
    stored = read_config(path)
    kind_of_file = stored.get("kind", command)
    if kind_of_file != command:
        raise Refused(f"The configuration {path} is for `tokenrl {kind_of_file}`; give it to that command.")
    try:
        of_a_run = "versions" in stored
        left_out = [*RECORDED, *["output_dir"] * (anew and of_a_run)]
        left_out += ["resume", "overwrite"] * (of_a_run or not anew)
        settings = arguments(kind, {name: value for name, value in stored.items() if name not in left_out})
        check(settings, objects=False)
        return settings
    except Refused as error:
        raise Refused(f"The configuration {path} cannot be used by tokenrl {command}: {error}") from error


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a configuration in JSON or YAML, or the config.json of a run directory.

    Raises:
        Refused: The file cannot be read, or it is not a mapping of names to values.
    """
    file = Path(path)
    try:
        file = file / "config.json" if file.is_dir() else file
        text = file.read_text(encoding="utf-8")
        config = _from_yaml(text) if file.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        problem = f"The file {file!s:.300} cannot be read ({error!s:.300})"
        raise Refused(f"{problem}. Mend or remove it, or give the settings in JSON or YAML.") from error
    if not isinstance(config, dict):
        raise Refused(f"The file {file} is a {type(config).__name__}; it must map names to values.")
    return config


def _from_yaml(text: str) -> Any:
    """Read YAML, and `1e-5` in it as a number, as YAML 1.2 does; PyYAML alone would read it as text."""
    import yaml

    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    try:
        config = yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return {str(name): value for name, value in config.items()} if isinstance(config, dict) else config
