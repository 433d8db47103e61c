"""Reads a table of scores, whatever tool wrote it, and says which of its runs failed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tokenrl.errors import Refused


def read_scores(
    table: Any, metric: str, failed: Sequence[tuple[Any, ...]], failure_below: float | None
) -> pd.DataFrame:
    """Return a table with the columns problem, arm, seed, score and failed.

    Args:
        table: the table; see `judge_scores`.
        metric: another name of the column `score`.
        failed: runs that failed, as (arm, seed) or (problem, arm, seed).
        failure_below: runs with a lower score failed too.

    Raises:
        Refused: the file or a row cannot be read, or a score is not finite or given twice.
    """
    frame = _as_frame(table)
    if frame.empty:
        raise Refused("The table has no rows; give one for each run, with arm, seed and score.")
    other_names = {"score": metric, "problem": "task"}
    frame = frame.rename(columns={b: a for a, b in other_names.items() if a not in frame and b in frame})
    for name in ("arm", "seed", "score"):
        if name not in frame:
            raise Refused(
                f"The table has the columns {', '.join(map(str, frame.columns))}; it needs arm, seed (a "
                f"whole number) and score (or {metric}), and problem if there are several."
            )
    found = pd.DataFrame(
        {
            "problem": frame["problem"].astype(str) if "problem" in frame else "",
            "arm": frame["arm"].astype(str),
            "seed": pd.to_numeric(frame["seed"], errors="coerce"),
            "score": pd.to_numeric(frame["score"], errors="coerce").astype(float),
        }
    ).reset_index(drop=True)
    keys = list(zip(found["problem"], found["arm"], found["seed"], strict=True))
    marked = frame["failed"].astype(str).str.lower() if "failed" in frame else pd.Series([""] * len(frame))
    named = [key in failed or key[1:] in failed for key in keys]
    found["failed"] = marked.isin(["true", "1", "1.0", "yes"]).to_numpy() | np.array(named)
    if failure_below is not None:
        found["failed"] |= found["score"] < failure_below
    _check(found, failed, keys)
    return found.astype({"seed": int})


def _as_frame(table: Any) -> pd.DataFrame:
    """Make a data frame of a CSV file, of another library's table, or of rows."""
    if isinstance(table, str | os.PathLike):
        try:
            return pd.read_csv(table, dtype=str, keep_default_na=False)  # "None" may be the name of an arm
        except (OSError, ValueError) as error:
            raise Refused(f"The table {table} cannot be read ({error}); give a CSV file.") from error
    if hasattr(table, "to_pandas"):
        table = table.to_pandas()
    if isinstance(table, pd.DataFrame):
        return table
    rows = list(table)
    if all(isinstance(row, Mapping) for row in rows):
        return pd.DataFrame(rows)
    for number, row in enumerate(rows):
        if isinstance(row, str) or not isinstance(row, Sequence) or len(row) not in (3, 4):
            raise Refused(
                f"Row {number} of the scores is {str(row)[:200]}; it must be (arm, seed, score), "
                "(arm, seed, score, problem), or a mapping with these names."
            )
    return pd.DataFrame([(*row, "")[:4] for row in rows], columns=["arm", "seed", "score", "problem"])


def _check(found: pd.DataFrame, failed: Sequence[tuple[Any, ...]], keys: Sequence[tuple[Any, ...]]) -> None:
    """Refuse seeds that are no whole numbers, scores that are none, and runs that are given twice."""
    known = {*keys, *(key[1:] for key in keys)}
    for run in failed:
        if run not in known:
            raise Refused(f"failed names the run {run}, which the table does not have; give (arm, seed).")
    seeds = found["seed"]
    for number in np.flatnonzero(~np.isfinite(seeds) | (seeds != seeds.round())):
        raise Refused(f"Row {number} has no whole number as its seed: arm {found['arm'][number]!r}.")
    for number in np.flatnonzero(~np.isfinite(found["score"]) & ~found["failed"]):
        raise Refused(
            f"Row {number} has no finite score: arm {found['arm'][number]!r}, seed {seeds[number]:.0f}. Give "
            "the score that the run had at its end, or say that it failed (failed, or a column failed); "
            "leaving failed runs out would flatter the arm."
        )
    for number in np.flatnonzero(found.duplicated(["problem", "arm", "seed"])):
        arm, seed = found["arm"][number], f"{seeds[number]:.0f}"
        raise Refused(f"Row {number} gives arm {arm!r}, seed {seed} a second time; give each run once.")
