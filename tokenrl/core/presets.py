"""Reads the presets: named points of the space of estimators, with the fields that each sets and its paper.

They are the rows of presets.txt. What each preset computes, and how other toolkits differ from it, is in
`recipes/pages/explain/estimators.md`. This module imports no torch.
"""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tokenrl.errors import Refused

Fields = dict[str, str | float | int | bool | None]

TO_GO: Fields = {"returns": "reward_to_go"}
"""The field by which an action is credited with the rewards that follow it."""


class Preset(NamedTuple):
    """The fields in which a preset differs from RLOO, and what it follows.

    Attributes:
        fields: the fields with their values.
        paper: the paper; for the default of another toolkit its name, version and file. What no paper has begins
            with `an option of` toolkits or `nobody`, and names the nearest paper.
        beyond: what that toolkit does and no axis expresses, with what it changes; empty for others.
    """

    fields: Fields
    paper: str
    beyond: str = ""

    @property
    def origin(self) -> str:
        """Who has it: a `paper`, a `toolkit`, or `nobody` but this project."""
        if self.paper.startswith("nobody"):
            return "nobody"
        return "toolkit" if self.beyond or self.paper.startswith("an option of") else "paper"


def read_changes(text: str) -> tuple[str, dict[str, Any]]:
    """Split a text such as `grpo,scale=none` into a name and the changes to what it names.

    Args:
        text: a name and changes, each NAME=VALUE, or one of the two. Changes are separated by commas; a comma
            in brackets or quotes belongs to a value.

    Returns:
        The name, empty if there is none, and the values of the changes by their names. Numbers, tuples, True,
        False and None are read as Python writes them; anything else is text.

    Raises:
        Refused: the text has another form, or changes something twice.
    """
    part = r"(?:[^,(\[{\"']|\([^)]*\)|\[[^\]]*\]|\{[^}]*\}|\"[^\"]*\"|'[^']*')+"  # no commas but in brackets
    if not text:
        raise Refused("it is empty; name a preset, such as rloo.")
    if not re.fullmatch(rf"{part}(,{part})*", text):
        raise Refused("a bracket or a quote is not closed, or nothing stands beside a comma.")
    pieces = [piece.strip() for piece in re.findall(part, text)]
    head = "" if "=" in pieces[0] else pieces.pop(0)
    changes = dict[str, Any]()
    for piece in pieces:
        name, equals, value = map(str.strip, piece.partition("="))
        name = name.removeprefix("--").removeprefix("estimator.").replace("-", "_")
        if not name or not equals:
            raise Refused(
                f'write {piece!r} as NAME=VALUE, as in "grpo,scale=none"; spaces separate names.'
            )
        if name in changes:
            raise Refused(f"{name} is given twice; give it once.")
        changes[name] = {"true": True, "false": False}.get(value, value)
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            changes[name] = ast.literal_eval(value)
    return head, changes


def _presets() -> dict[str, Preset]:
    """Read the rows of presets.txt."""
    presets = {}
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if re.match("[a-z0-9_]+ [|] ", line):
            name, fields, *origin = line.split(" | ")
            presets[name] = Preset(read_changes(fields)[1] if fields else {}, *origin)
    return presets


PRESETS = _presets()
