"""Says which estimator a configuration of TRL is, and what of it no axis expresses. Imports no torch.

TRL itself is not needed.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import read_changes
from tokenrl.errors import Refused
from tokenrl.settings import check_choice

CLASSES = {"grpo": "GRPOConfig of TRL 1.16.0", "rloo": "RLOOConfig of TRL 1.16.0"}


@cache
def table() -> list[dict[str, Any]]:
    """Return the rows of trl_config.yaml, which says what they mean; every word in them is a text."""
    import yaml

    return yaml.load(Path(__file__).with_suffix(".yaml").read_bytes(), yaml.BaseLoader)  # type: ignore[no-any-return]


def read_trl_config(path: str) -> tuple[str, Estimator, list[str]]:
    """Read the fields of a configuration of TRL from JSON or YAML; TRL's defaults hold for the others.

    A field `trainer`, grpo or rloo, says which class it is; without one it is RLOOConfig if the file has a field
    that GRPOConfig lacks.

    Returns:
        The class of TRL and its version; the estimator that the configuration is; and what no axis expresses.

    Raises:
        Refused: The file is no such configuration, or TRL does not take one of its values.
    """
    fields = {name: _plain(value) for name, value in read_config(path).items() if value is not None}
    owners = {"trainer": {*CLASSES}}
    choices = defaultdict[str, list[str]](list)
    for row in table():
        owners.setdefault(row["field"], set()).update(row["of"])
        choices[row["field"]] += row.get("values", ())
    for name in fields.keys() - owners:
        for close in get_close_matches(name, owners, n=1, cutoff=0.9):
            raise Refused(f"{path}: {name!r} is no field of TRL. Did you mean {close!r}?")
    known = {name: owners[name] for name in fields.keys() & owners}
    trainer = fields.get("trainer", "rloo" if {"rloo"} in known.values() else "grpo")
    check_choice("trainer", trainer, CLASSES)
    for name, classes in known.items():
        if trainer not in classes:
            kind = CLASSES[trainer]
            raise Refused(f"{path}: a {kind}, which it is read as, has no field {name}.")
    axes: dict[str, Any] = {}
    remarks = []
    try:
        for row in table():
            value = fields.get(row["field"])
            if value is None or trainer not in row["of"]:
                continue
            if choices[row["field"]]:
                check_choice(row["field"], value, choices[row["field"]])
            if value in row.get("values", {value} - {row.get("unless", "none")}):
                if "changes" in row:
                    axes |= read_changes(row["changes"].replace("*", value))[1]
                remarks.append(row.get("remark", ""))
        estimator = Estimator.preset(f"trl_{trainer}", **axes)
    except Refused as error:
        raise Refused(f"{path} cannot be read as a {CLASSES[trainer]}: {error}") from error
    return CLASSES[trainer], estimator, list(dict.fromkeys(remarks))


def _plain(value: Any) -> str:
    """Write a value as the table does: in small letters, and a number without what does not count."""
    text = str(value).lower()
    with suppress(ValueError):
        text = f"{float(text):.12g}"
    return text
