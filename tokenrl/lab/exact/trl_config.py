"""Says which estimator a configuration of TRL is, and which of its fields change nothing. Imports no torch.

trl_config.txt has the defaults of GRPOConfig and RLOOConfig, and for a field or one of its values the axes that
it sets, the fields that it leaves without effect, and what no axis expresses. TRL itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.settings import check_choice

CLASSES = {"grpo": "GRPOConfig of TRL 1.16.0", "rloo": "RLOOConfig of TRL 1.16.0"}
ROW = re.compile(r"^([a-z/]+) +[|] (\w+) +[|] (\S+) +[|] (.*)", re.MULTILINE)
TO_JSON = "python -c \"import torch; print(torch.load('training_args.bin', weights_only=False).to_json_string())\""

Reading = tuple[str, Estimator, list[str], list[str]]


@cache
def meaning(trainer: str, kind: str) -> dict[str, str]:
    """Return the rows of one kind in trl_config.txt for a class: their texts by `field` or `field=value`."""
    texts: dict[str, str] = {}
    for trainers, row, key, text in ROW.findall(
        Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    ):
        if row == kind and trainer in trainers.split("/"):
            name, equals, values = key.partition("=")
            texts |= {name + equals + value: text for value in values.split("/")}
    return texts


def read_trl_config(path: str) -> Reading:
    """Read the fields of a configuration of TRL from JSON or YAML; TRL's defaults hold for the others.

    A field `trainer`, grpo or rloo, says which class it is; without one it is RLOOConfig if the file has a field
    that GRPOConfig lacks.

    Returns:
        The class of TRL and its version; the estimator that the configuration is; fields that the file changes
        without any effect in the first update from a rollout, with the reason; and what no axis expresses.

    Raises:
        Refused: The file is no such configuration, or TRL does not take one of its values.
    """
    if path.endswith((".bin", ".pt", ".pkl")):
        raise Refused(
            f"{path} is a pickle, which can run any program when it is read. If it is your own, write its "
            f"fields as JSON where TRL is installed, and give that file: {TO_JSON} > config.json"
        )
    fields = {name: _plain(value) for name, value in read_config(path).items()}
    usual = {}
    for trainer in (*CLASSES, "distillation"):
        pairs = " ".join(meaning(trainer, "default").values()).split()
        usual[trainer] = dict(pair.split("=") for pair in pairs)
    names = {"trainer"}.union(*usual.values())
    for name in fields.keys() - names:
        for close in get_close_matches(name, names, n=1, cutoff=0.9):
            raise Refused(f"{path}: {name!r} is no field of TRL. Did you mean {close!r}?")
    if not fields.keys() & names:
        kinds = ", ".join(CLASSES.values())
        raise Refused(
            f"{path} has no field of these: {kinds}. Give loss_type or beta, for example."
        )
    is_rloo = fields.keys() & usual["rloo"].keys() - usual["grpo"].keys()
    trainer = fields.pop("trainer", "rloo" if is_rloo else "grpo")
    check_choice("trainer", trainer, CLASSES)
    for name in sorted(fields.keys() & names - usual[trainer].keys()):
        raise Refused(f"{path}: a {CLASSES[trainer]}, which it is read as, has no field {name}.")
    try:
        return _reading(trainer, usual[trainer], fields)
    except Refused as error:
        raise Refused(f"{path} cannot be read as a {CLASSES[trainer]}: {error}") from error


def _reading(trainer: str, usual: Mapping[str, str], fields: Mapping[str, str]) -> Reading:
    """Look up the fields of a file, and the defaults of the others."""
    values = {**usual, **fields}
    choices = meaning(trainer, "axes")
    axes: dict[str, str] = {}
    for name, value in values.items():
        allowed = [key.partition("=")[2] for key in choices if key.startswith(f"{name}=")]
        if allowed:
            check_choice(name, value, allowed)
        words = _text(choices, name, value).replace("$", value.capitalize())
        axes |= dict(pair.split("=") for pair in words.split())
    if axes.get("ratio") == "none":  # which uses no bounds
        axes = {
            name: axes[name]
            for name in axes
            if name not in ("epsilon", "epsilon_high", "dual_clip")
        }
    changed = {name: value for name, value in fields.items() if value != usual.get(name)}
    idle: dict[str, list[str]] = {}
    for name in changed:
        for text in (_text(meaning(trainer, "idle"), *pair) for pair in values.items()):
            patterns, _, reason = text.partition(": ")
            if any(fnmatch(name, pattern) for pattern in patterns.split()):
                idle.setdefault(reason, []).append(name)
                break
    changes = [f"{axis}={value}" for axis, value in axes.items()]
    return (
        CLASSES[trainer],
        Estimator.preset(",".join([f"trl_{trainer}", *changes])),
        [f"{', '.join(names)}: {reason}." for reason, names in idle.items()],
        list(dict.fromkeys(_text(meaning(trainer, "beyond"), *pair) for pair in changed.items())),
    )


def _text(texts: Mapping[str, str], name: str, value: str) -> str:
    """Return the text of a value of a field, else that of the field; empty if there is none."""
    return texts.get(f"{name}={value}", texts.get(name, ""))


def _plain(value: Any) -> str:
    """Write a value as the table does: in small letters, and a number without what does not count."""
    text = str(value).lower()
    text = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(text, text)
    with suppress(ValueError):
        text = f"{float(text):.12g}"
    return text
