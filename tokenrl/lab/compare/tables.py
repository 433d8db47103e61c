"""Writes what a comparison found as tables: runs.csv, comparisons.csv and comparison.json.

Times depend on the machine and on what else it does. They stand under `timings` in comparison.json and
nowhere else, so that the other numbers of two comparisons can be compared bit for bit.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from tokenrl.lab.compare.records import RunRecord
from tokenrl.lab.compare.scores import SCORES
from tokenrl.lab.compare.statistics.found import Difference, Family, Interval
from tokenrl.runs.files import write_json, write_text
from tokenrl.runs.resume import processor

if TYPE_CHECKING:
    from tokenrl.lab.compare.comparison import Comparison
    from tokenrl.lab.compare.statistics.survival import ToThreshold

Row = dict[str, Any]

TIMES = ("seconds", "restricted_seconds", "seconds_limit")
"""Fields of `ToThreshold` that are times."""
CITATION = """@software{{tokenrl,
  title = {{tokenrl: policy gradients on language models, with declared bias}},
  version = {{{version}}},
  year = {{2026}},
}}"""


def write_tables(found: Comparison) -> None:
    """Write runs.csv, comparisons.csv and comparison.json into the directory of a comparison.

    Raises:
        Stopped: a file cannot be written.
    """
    _write_csv(found, "runs.csv", run_rows(found.records))
    _write_csv(found, "comparisons.csv", comparison_rows(found))
    write_json(found.output_dir / "comparison.json", as_json(found))


def run_rows(records: Sequence[RunRecord]) -> list[Row]:
    """Return a row for each run: what it is, how it ended, its samples and its scores."""
    names = [name for name in SCORES if any(name in record.scores for record in records)]
    return [
        {
            "problem": record.run.problem,
            "arm": record.run.arm,
            "seed": record.run.seed,
            "role": record.run.role,
            "state": record.state,
            "reason": record.reason,
            "learning_rate": record.run.settings.get("learning_rate"),
            "samples": record.samples[-1] if record.samples else None,
            **{name: record.scores.get(name) for name in names},
            "path": record.run.path,
        }
        for record in records
    ]


def comparison_rows(found: Comparison) -> list[Row]:
    """Return a row for each paired difference: first of the metric that decides, then of those beside it."""
    return [
        _difference_row(judgement.metric, judgement is found.judgement, family, difference)
        for judgement in (found.judgement, *found.beside.values())
        for family in judgement.families
        for difference in _all_differences(family)
    ]


def _all_differences(family: Family) -> Iterator[Difference]:
    yield from family.differences
    if family.itself is not None:
        yield family.itself


def _difference_row(metric: str, decides: bool, family: Family, found: Difference) -> Row:
    return {
        "problem": family.problem,
        "metric": metric,
        "decides": "yes" if decides and found is not family.itself else "no",
        "arm": found.arm,
        "reference": found.reference,
        "pairs": len(found.differences),
        "unpaired": " ".join(map(str, found.unpaired)),
        **_interval("difference", found.mean),
        "level": found.level,
        "low_at_level": found.adjusted.low,
        "high_at_level": found.adjusted.high,
        "sd": found.sd,
        "p_sign_flip": found.p_sign_flip,
        "p_least": found.p_least,
        "p_holm": found.p_holm,
        **_interval("improvement", found.improvement),
        "margin": family.margin,
        "verdict": found.verdict,
        "seeds_needed": found.seeds_needed,
    }


def _interval(name: str, found: Interval) -> Row:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _write_csv(found: Comparison, name: str, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    table.writeheader()
    table.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    write_text(found.output_dir / name, text.getvalue())


def _cell(value: Any) -> Any:
    """Return an empty cell for a number that is missing; floats keep all their digits."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value


def as_json(found: Comparison) -> Row:
    """Return all that was planned and found, as `write_json` writes it."""
    thresholds = {label: [_threshold(one) for one in of] for label, of in found.to_threshold.items()}
    return {
        "plan": asdict(found.plan),
        "runs": [_run(record) for record in found.records],
        "judgement": _named(found.judgement),
        "beside": _named(found.beside),
        "scores": {name: score._asdict() for name, score in SCORES.items()},
        "findings": found.findings,
        "to_threshold": thresholds,
        "learning_rates": [{**_key(key), "rate": rate} for key, rate in found.rates.items()],
        "sensitivity": [
            {**_key(key), "rate": rate, "scores": scores}
            for key, tried in found.sensitivity.items()
            for rate, scores in tried.items()
        ],
        "noise": _named(found.noise),
        "overall": _named(found.overall),
        "versions": found.versions,
        "hardware": {"processor": processor()},
        "command": found.plan.command,
        "citation": CITATION.format(version=found.versions.get("tokenrl", "")),
        "timings": _timings(found),
    }


def _named(value: Any) -> Any:
    """Return dataclasses and intervals as mappings, so that each number has its name in JSON."""
    if isinstance(value, Interval):
        return value._asdict()
    if is_dataclass(value):
        return {field.name: _named(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: _named(one) for key, one in value.items()}
    return [_named(one) for one in value] if isinstance(value, list | tuple) else value


def _key(key: tuple[str, str]) -> Row:
    return {"problem": key[0], "arm": key[1]}


def _run(record: RunRecord) -> Row:
    """Return a record without its times, and without completions, which the run's directory has."""
    return {name: value for name, value in asdict(record).items() if name not in ("seconds", "completions")}


def _threshold(found: ToThreshold) -> Row:
    return {name: value for name, value in _named(found).items() if name not in TIMES}


def _timings(found: Comparison) -> Mapping[str, Any]:
    return {
        "wall_seconds": found.wall_seconds,
        "runs": {record.run.path: record.seconds for record in found.records},
        "to_threshold": {
            label: {one.arm: {name: _named(getattr(one, name)) for name in TIMES} for one in of}
            for label, of in found.to_threshold.items()
        },
    }
