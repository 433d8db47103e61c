"""Says which estimator a configuration of TRL is, and which of its fields change nothing. Imports no torch.

The rules are rows of trl_config.txt: the defaults of TRL, what a field sets in the estimator, and under which
conditions it has no effect. TRL itself is not needed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from tokenrl.configuration import read_config
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import read_changes
from tokenrl.errors import Refused
from tokenrl.settings import arguments, check_choice, check_number

CLASSES = {"grpo": "GRPOConfig of TRL 1.16.0", "rloo": "RLOOConfig of TRL 1.16.0"}
EXPORT = 60
"""A file of more fields was written by a program; only those that differ from TRL's defaults are listed."""
COUNTS = (
    *(
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "num_iterations",
        "num_generations",
    ),
    *("steps_per_generation", "generation_batch_size"),
)
NUMBER = r"[-+]?[0-9]+([.][0-9]*)?(e[-+]?[0-9]+)?"
TO_JSON = "python -c \"import torch; print(torch.load('training_args.bin', weights_only=False).to_json_string())\""


Reading = tuple[str, Estimator, list[str], list[str]]


@cache
def table() -> list[list[str]]:
    """Return the rows of trl_config.txt: the kind of each, and its columns."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    return [
        re.split(r" +[|] ", line) for line in text.splitlines() if re.match(r"[a-z]+ +[|] ", line)
    ]


def rows(kind: str, values: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the rows of one kind whose conditions hold, without the conditions."""
    for row, conditions, *columns in table():
        if row == kind and all(_holds(condition, values) for condition in conditions.split()):
            yield columns


def _holds(condition: str, values: Mapping[str, str]) -> bool:
    """Whether NAME=A/B or NAME!=A/B holds; no condition holds for a field that the class does not have."""
    name, _, allowed = condition.partition("=")
    value = values.get(name.rstrip("!"))
    return value is not None and (value in allowed.split("/")) != name.endswith("!")


def read_trl_config(path: str) -> Reading:
    """Read the fields of a GRPOConfig or an RLOOConfig from JSON or YAML; TRL's defaults hold for the others.

    A field `trainer`, grpo or rloo, says which class it is if no other field does; without one it is GRPO.

    Returns:
        The class of TRL and its version; the estimator that the configuration is; fields of the file that
        change nothing, with the reason (those of one reason share a line); and what no field of the estimator
        expresses.

    Raises:
        Refused: The file is no such configuration, or TRL does not take one of its values.
    """
    if path.endswith((".bin", ".pt", ".pkl")):
        raise Refused(
            f"{path} is a pickle, which can run any program when it is read. If it is your own, write its "
            f"fields as JSON where TRL is installed, and give that file: {TO_JSON} > config.json"
        )
    fields = {name: _plain(value) for name, value in read_config(path).items()}
    usual = {trainer: _defaults(trainer) for trainer in CLASSES}
    names = {"trainer", *usual["grpo"], *usual["rloo"]}
    for name in fields.keys() - names:
        if close := get_close_matches(name, names, n=1, cutoff=0.9):
            raise Refused(f"{path}: {name!r} is no field of TRL. Did you mean {close[0]!r}?")
    if not fields.keys() & names:
        raise Refused(
            f"{path} has no field of GRPOConfig or RLOOConfig, such as loss_type, beta or epsilon."
        )
    of_rloo = fields.keys() & usual["rloo"].keys() - usual["grpo"].keys()
    trainer = fields.pop("trainer", "rloo" if of_rloo else "grpo")
    check_choice("trainer", trainer, CLASSES)
    if foreign := sorted(fields.keys() & names - usual[trainer].keys()):
        raise Refused(
            f"{path}: a {CLASSES[trainer]} has no field {', '.join(foreign)}; leave it out."
        )
    try:
        return _reading(trainer, usual[trainer], fields)
    except Refused as error:
        raise Refused(f"{path} cannot be read as a {CLASSES[trainer]}: {error}") from error


def _defaults(trainer: str) -> dict[str, str]:
    """Return the fields of a class with their defaults."""
    texts = rows("default", {"trainer": trainer})
    return dict(pair.split("=") for (text,) in texts for pair in text.split())


def _reading(trainer: str, usual: Mapping[str, str], fields: Mapping[str, str]) -> Reading:
    """Apply the rules to the fields of a file and the defaults of the others."""
    values = {**usual, **fields, "trainer": trainer}
    scale = values.get("scale_rewards", "")
    values["scale_rewards"] = {"true": "group", "false": "none"}.get(scale, scale)
    values |= _derived(values)
    for name, names in rows("allowed", values):
        check_choice(name, values[name], names.split())
    changes: dict[str, Any] = {}
    for (text,) in rows("set", values):
        text = re.sub(r"[$](\w+)", lambda match: values[match[1]], text)
        changes |= {
            name: x for name, x in read_changes(text.replace(" ", ","))[1].items() if x != "none"
        }
    listed = [n for n in fields if len(fields) <= EXPORT or fields[n] != usual.get(n)]
    idle: dict[str, list[str]] = {}
    for patterns, reason in rows("idle", values):
        matching = [n for n in listed if any(fnmatch(n, pattern) for pattern in patterns.split())]
        listed = [n for n in listed if n not in matching]
        idle.setdefault(reason, []).extend(matching)
    lines = [f"{', '.join(matching)}: {reason}." for reason, matching in idle.items() if matching]
    remarks = [remark for (remark,) in rows("remark", values)]
    return CLASSES[trainer], arguments(Estimator, changes), lines, remarks


def _derived(values: Mapping[str, str]) -> dict[str, str]:
    """Return the updates from one rollout, CISPO's bound and the weights of KL and entropy relative to it."""
    number = {name: _number(name, values[name], int) for name in COUNTS if values[name] != "none"}
    accumulated = number["gradient_accumulation_steps"]
    slices = (
        number.get("generation_batch_size", 0) // number["per_device_train_batch_size"]
        or accumulated
    )
    rollout = number.get("steps_per_generation", slices) * number["num_iterations"]
    name = "epsilon" if values["epsilon_high"] == "none" else "epsilon_high"
    bound = _number(name, values[name], float)
    capped = values.get("loss_type") == "cispo" and bound <= 1
    if capped:
        check_number(name, bound, above=0)
    derived = {"capped": str(capped).lower(), "excess": f"{bound - 1:.12g}"}
    for term in ("beta", "entropy_coef"):
        weight = _number(term, values.get(term, "0"), float)
        derived[f"relative_{term}"] = f"{weight / bound if capped else weight:.12g}"
    updates = "several" if accumulated % rollout else "1"
    return {"updates": updates, **derived}


def _number(name: str, text: str, kind: type[float]) -> float:
    """Read a number, which must be at least 1 if it is a count."""
    value = kind(text) if re.fullmatch("[0-9]+" if kind is int else NUMBER, text) else text
    check_number(name, value, kind, **({"at_least": 1} if kind is int else {}))
    return kind(value)


def _plain(value: Any) -> str:
    """Write a value as the table does: in small letters, and a number without what does not count."""
    text = str(value).lower()
    return f"{float(text):.12g}" if re.fullmatch(NUMBER, text) else text
