"""Fills the template of a prompt from the columns of a row, and from the parts of nested columns.

A field names a column, such as `{question}`, or a part of one, such as `{robot.pose.x}` or `{joints[0]}`. Lists and
mappings are written as JSON. A method of Python is no part of a value; an attribute, such as the year of a date, is.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from typing import Any

from tokenrl.errors import Refused, describe, suggest
from tokenrl.language.tasks.rows import Row


def filled(template: str, row: Row, subject: str) -> tuple[str, list[str]]:
    """Return a prompt that a template makes from the columns of a row, and the values that it puts there.

    Args:
        template: the template, with columns and parts of columns in braces.
        row: the row.
        subject: what a message says that cannot be made.

    Returns:
        The prompt, and the values as texts without blanks at their ends, in the order of the template.

    Raises:
        Refused: the template cannot be filled from the row, as where a value is missing.
    """
    fields = Fields()
    try:
        return fields.vformat(template, (), row), fields.used
    except Exception as error:  # values have formats of their own
        raise Refused(
            f"{subject} cannot be made ({describe(error)}). Name columns in braces, each with a value, and parts of "
            "a column behind a dot, as in {robot.pose.x} or {robot.joints.0}; write {{ for a brace."
        ) from error


class Fields(string.Formatter):
    """Reads the fields of a template from a row; a missing value is an error, since None would enter the prompt.

    Attributes:
        used: the values that were read so far, as texts without blanks at their ends.
    """

    def __init__(self) -> None:
        self.used: list[str] = []

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> Any:
        """Return the value of a field, and its name. A column whose own name has dots goes first."""
        value = kwargs
        for name in [field_name] if field_name in kwargs else re.findall(r"[^][.]+", field_name):
            parts = {}
            if isinstance(value, Mapping):
                parts = {str(key): part for key, part in value.items()}
            elif isinstance(value, list | tuple):
                parts = {str(number): part for number, part in enumerate(value)}
            value = parts[name] if name in parts else getattr(value, name, len)
            if callable(value):
                raise LookupError(f"{field_name}: there is no {name!r}.{suggest(name, parts)}")
        if value is None or value != value:
            raise ValueError(f"column {field_name!r} is {value!r}")
        if isinstance(value, list | tuple | Mapping):
            value = json.dumps(value, ensure_ascii=False, default=str)
        self.used.append(str(value).strip())
        return value, field_name
