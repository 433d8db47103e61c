"""Says what a check (`--check`) of a training found: what it measured, and what is wrong with how to mend it.

Every training collects its findings in one pass and hands them to `conclude`, so that a configuration with
three problems is told all three at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from tokenrl.errors import Refused
from tokenrl.runs.console import rich_table
from tokenrl.runs.findings import Finding
from tokenrl.runs.reader import Outcome
from tokenrl.runs.session import Session

R = TypeVar("R", bound=Outcome)


def conclude(session: Session, parts: str, measured: Mapping[str, str], findings: Sequence[Finding]) -> int:
    """Print what a check measured and found, set the flags of the session, and return the exit code.

    The table and the remarks go to the standard output, which `quiet` switches off; the problems go to the
    standard error, as errors do.

    Args:
        session: the session of the run, which has not begun.
        parts: what was checked, in words, such as "model, data and rewards".
        measured: the lines of the table.
        findings: problems, which make training pointless or wrong (`void`), and remarks.

    Returns:
        0 if there is no problem, else that of a refusal, 2.
    """
    problems = [finding for finding in findings if finding.weight == "void"]
    remarks = [finding for finding in findings if finding.weight != "void"]
    session.flags += [finding.flag for finding in (*problems, *remarks)]
    console = session.console
    if not problems:
        console.note(f"Check passed: {parts} work together. Nothing was trained.")
    table = rich_table(show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in measured.items():
        table.add_row(name, text)
    console.rich.print(table)
    for remark in remarks:
        console.warn(str(remark))
    if not problems:
        return 0
    if session.directory is not None:  # the main process
        sys.stdout.flush()  # the table first, where both go to one place
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        lines = [f"tokenrl: Check not passed: {count}. Nothing was trained."]
        lines += [f"  {place}. {problem}" for place, problem in enumerate(problems, 1)]
        print("\n".join(lines), file=sys.stderr)
    return Refused.exit_code


def checked(result: R, code: int) -> R:
    """Return the result of a check with its exit code, unless a signal has ended it."""
    return replace(result, exit_code=result.exit_code or code)
