"""Says which runs can be compared: what is the same in all of them, and what in all runs of an arm.

The facts of a run are its settings, and hashes of the code, the data and the models that it was made from. Whether a
setting may differ between arms stands beside its field (`settings.MEASURED`), and a hash follows the settings that
decide it. Every way to a verdict asks `check_equal`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from tokenrl.configuration import code_in
from tokenrl.control import ControlArguments
from tokenrl.errors import Refused
from tokenrl.language import TrainArguments
from tokenrl.runs import HASH, ROUNDING, RecordedRun, facts_of
from tokenrl.settings import MEASURED, field_types, mentions

KINDS: dict[str, Any] = {"train": TrainArguments, "control": ControlArguments}
"""The settings of the commands whose runs can be compared."""
WITHIN_ARM = {"seed", "chat_time", *ROUNDING} - {"generator"}
"""Settings that may differ between the runs of an arm."""
WITHIN = "Runs of one arm differ in their seeds alone."
EVERYWHERE = (
    "Runs that are compared have the same task, reward, model, data and evaluations, and one state of the code but for "
    "files that only an estimator names: make all runs so."
)


@cache
def measured(kind: Any) -> set[str]:
    """Return the settings of a dataclass that decide what is measured: the same in all runs that are compared."""
    groups = [base for base in kind.__mro__ if getattr(base, "measured", False)]
    names = {each.name for group in groups for each in fields(group)}
    return names | {name for name, hint in field_types(kind).items() if mentions(hint, MEASURED)}


def check_equal(runs: Iterable[tuple[str, RecordedRun]], varying: Sequence[str] = ()) -> None:
    """Refuse runs that cannot be compared. A fact that only some runs have says nothing.

    Args:
        runs: the arm and the record of each run.
        varying: further settings that may differ between the runs of an arm.

    Raises:
        Refused: two runs differ in what decides what is measured, or two of an arm in anything but the seed; or a
            completion ended one.
    """
    values = dict[tuple[str, str], tuple[str, Path]]()
    for arm, run in runs:
        if run.config.get("kind") not in KINDS:
            raise Refused(
                f"{run.path} holds no run of {' or '.join(KINDS)}, which can be compared."
            )
        if run.summary.get("completions_until_solved") is not None:
            raise Refused(
                f"{run.path} ended at once when a completion had the reward that stop_at_reward names, so its held-out "
                "rewards are those of that moment. Judge completions_until_solved of summary.json by a test of your "
                "own, or train without stop_at_reward."
            )
        for name, value in facts_of(run).items():
            if name in WITHIN_ARM or name in varying:
                continue
            scope = "" if _is_measured(name, run) else arm
            first, path = values.setdefault((name, scope), (value, run.path))
            if value != first:
                raise Refused(
                    f"The runs {path} and {run.path} cannot be compared, as they differ in {name}: {first:.80} and "
                    f"{value:.80}. {WITHIN if scope else EVERYWHERE}"
                )


def _is_measured(name: str, run: RecordedRun) -> bool:
    """Return whether a fact is the same in all runs that are compared, and not only in those of an arm.

    A fact follows the settings that decide it: a setting itself, the hash of its code, and a module that it names. One
    that no setting decides, such as the hash of the data, is the same in all.
    """
    kind = KINDS[run.kind]
    subject = name.removeprefix(HASH)
    named = [name for name, _, source in code_in(kind, run.config) if subject == _module(source)]
    owners = {re.split("[. ]", owner)[0] for owner in (*named, subject)} & field_types(kind).keys()
    return not owners or not owners.isdisjoint(measured(kind))


def _module(source: str) -> str:
    """Return the name by which a module or a file is hashed."""
    return f"module {Path(source).stem if source.endswith('.py') else source}"
