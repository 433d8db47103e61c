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
from typing import Annotated, Any

from tokenrl.configuration import read_config
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import read_changes
from tokenrl.errors import Refused
from tokenrl.settings import Bounds, arguments, check_choice, check_number, checked

CLASSES = {
    "grpo": "GRPOConfig of TRL 1.16.0",
    "rloo": "RLOOConfig of TRL 1.16.0",
    "distillation": "DistillationConfig of TRL 1.16.0",
    "gkd": "GKDConfig of TRL 1.16.0",
    "iw_opd": "IWOPDConfig of TRL 1.16.0",
}
EXPORT = 60
"""A file of more fields was written by a program; only those that differ from TRL's defaults are listed."""
COUNTS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
    "num_generations",
    "steps_per_generation",
    "generation_batch_size",
)
NUMBER = r"[-+]?[0-9]+([.][0-9]*)?(e[-+]?[0-9]+)?"
TO_JSON = "python -c \"import torch; print(torch.load('training_args.bin', weights_only=False).to_json_string())\""


Reading = tuple[str, Estimator, list[str], list[str]]


@cache
def table() -> list[list[str]]:
    """Return the rows of trl_config.txt: the kind of each, and its columns."""
    text = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8")
    lines = re.findall(r"^[a-z]+ +[|] .*", text, re.MULTILINE)
    return [re.split(r" +[|] ", line) for line in lines]


def rows(kind: str, values: Mapping[str, str]) -> Iterator[list[str]]:
    """Yield the rows of one kind whose conditions hold, without the conditions."""
    for row, conditions, *columns in table():
        if row == kind and all(_holds(condition, values) for condition in conditions.split()):
            yield columns


def _holds(condition: str, values: Mapping[str, str]) -> bool:
    """Whether NAME=A/B or NAME!=A/B holds; no condition holds for a field that the class does not have."""
    name, _, allowed = condition.partition("=")
    value = values.get(name.removesuffix("!"))
    is_allowed = value in allowed.split("/")
    return value is not None and is_allowed != name.endswith("!")


def read_trl_config(path: str) -> Reading:
    """Read the fields of a configuration of TRL from JSON or YAML; TRL's defaults hold for the others.

    A field `trainer`, a name of `CLASSES`, says which class it is; without one it is the class that has the
    most fields of the file.

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
    names = {"trainer"}.union(*usual.values())
    for name in fields.keys() - names:
        for close in get_close_matches(name, names, n=1, cutoff=0.9):
            raise Refused(f"{path}: {name!r} is no field of TRL. Did you mean {close!r}?")
    if not fields.keys() & names:
        kinds = ", ".join(CLASSES.values())
        raise Refused(
            f"{path} has no field of these: {kinds}. Give loss_type or beta, for example."
        )
    shared = {name: len(usual[name].keys() & fields) for name in CLASSES}
    trainer = fields.pop("trainer", max(CLASSES, key=shared.__getitem__))
    check_choice("trainer", trainer, CLASSES)
    foreign = fields.keys() & names - usual[trainer].keys()
    if foreign:
        listed = ", ".join(sorted(foreign))
        raise Refused(f"{path}: a {CLASSES[trainer]} has no field {listed}; leave it out.")
    try:
        return _reading(trainer, usual[trainer], fields)
    except Refused as error:
        raise Refused(f"{path} cannot be read as a {CLASSES[trainer]}: {error}") from error


def _defaults(trainer: str) -> dict[str, str]:
    """Return the fields of a class with their defaults."""
    texts = [text for (text,) in rows("default", {"trainer": trainer})]
    return dict(pair.split("=") for pair in " ".join(texts).split())


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
        filled = re.sub(r"[$](\w+)", lambda match: values[match[1]], text)
        _, axes = read_changes(filled.replace(" ", ","))
        changes |= {k: value for k, value in axes.items() if k == "baseline" or value != "none"}
    remarks = [remark for (remark,) in rows("remark", values)]
    idle = _idle(fields, usual, values)
    return CLASSES[trainer], arguments(Estimator, changes), idle, remarks


def _idle(
    fields: Mapping[str, str], usual: Mapping[str, str], values: Mapping[str, str]
) -> list[str]:
    """Return a sentence for each reason for which fields of a file change nothing."""
    names = list(fields)
    if len(fields) > EXPORT:
        names = [name for name in fields if fields[name] != usual.get(name)]
    by_reason: dict[str, list[str]] = {}
    for patterns, reason in rows("idle", values):
        for name in list(names):
            if any(fnmatch(name, pattern) for pattern in patterns.split()):
                by_reason.setdefault(reason, []).append(name)
                names.remove(name)
    return [f"{', '.join(names)}: {reason}." for reason, names in by_reason.items()]


def _derived(values: Mapping[str, str]) -> dict[str, str]:
    """Return the updates from one rollout, CISPO's bound and the weights of KL and entropy relative to it.

    A trainer of distillation has one update and no bound, and its beta and lmbda are shares.
    """
    if "epsilon" not in values:
        for share in {"beta", "lmbda"} & values.keys():
            _number(share, values[share], float, at_least=0, at_most=1)
        return {"updates": "1"}
    counts = {}
    for name in COUNTS:
        if values[name] != "none":
            counts[name] = int(_number(name, values[name], int, at_least=1))
    accumulated = counts["gradient_accumulation_steps"]
    batches = counts.get("generation_batch_size", 0) // counts["per_device_train_batch_size"]
    passes = counts.get("steps_per_generation", batches or accumulated)
    rollout = passes * counts["num_iterations"]
    name = "epsilon" if values["epsilon_high"] == "none" else "epsilon_high"
    bound = _number(name, values[name], float)
    capped = values.get("loss_type") == "cispo" and bound <= 1
    unit = 1.0
    if capped:
        check_number(name, bound, above=0)
        unit = bound
    derived = {
        "updates": "several" if accumulated % rollout else "1",
        "capped": str(capped).lower(),
        "excess": f"{bound - 1:.12g}",
    }
    for term in ("beta", "entropy_coef"):
        weight = _number(term, values.get(term, "0"), float)
        derived[f"relative_{term}"] = f"{weight / unit:.12g}"
    return derived


def _number(name: str, text: str, kind: type[float], **bounds: float) -> float:
    """Read a number within bounds.

    Raises:
        Refused: The text is no such number, or it lies outside the bounds.
    """
    hint: Any = Annotated[kind, Bounds(**bounds)]
    value: float = checked(name, text, hint)
    return value


def _plain(value: Any) -> str:
    """Write a value as the table does: in small letters, and a number without what does not count."""
    text = str(value).lower()
    text = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(text, text)
    return f"{float(text):.12g}" if re.fullmatch(NUMBER, text) else text
