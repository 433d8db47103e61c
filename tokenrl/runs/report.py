"""Writes the report of a run: one self-contained HTML file, made from the files of the run directory."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, TypeVar

from tokenrl.configuration import read_config
from tokenrl.errors import Refused
from tokenrl.runs.console import ending, number
from tokenrl.runs.files import plain, write_text
from tokenrl.runs.metrics import read_completions, read_metrics
from tokenrl.runs.plots import learning_curve, series

T = TypeVar("T")

_STYLE = """
:root { color-scheme: light dark;
  --ink: #1d1d1f; --soft: #6b6b70; --line: #dcdce0; --page: #fff; --card: #f6f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf0; --soft: #9c9ca4; --line: #3a3a40; --page: #17171a; --card: #222227; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin: 0; }
h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem; }
.soft { color: var(--soft); margin: .2rem 0 1rem; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { background: var(--card); border-radius: .6rem; padding: .8rem 1.2rem; }
.card b { display: block; font-size: 1.7rem; font-variant-numeric: tabular-nums; }
img { max-width: 100%; border-radius: .6rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid var(--line); }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { font-family: ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre { background: var(--card); border-radius: .6rem; padding: .8rem 1rem; overflow-x: auto;
  font-size: .85rem; }
"""
_FROM_PYTHON = (
    "Started from Python, with functions or objects that no command can name: run that program again."
)
_DIAGNOSTICS = (
    (
        "frac_reward_zero_std",
        "groups without signal",
        "fraction of prompts whose completions all have the same reward",
    ),
    ("completions/clipped_ratio", "truncated", "fraction of completions cut at the length limit"),
    ("entropy", "entropy", "nats per action (token); near 0 the policy no longer explores"),
    ("kl", "KL to the reference", "nats per completion"),
    ("episode_length", "episode length", "mean steps of the episodes that ended"),
    ("explained_variance", "critic", "share of the returns' variance that it explains; below 0 it does harm"),
    ("grad_norm", "gradient norm", "before clipping"),
    ("clip_ratio", "clipped ratios", "fraction of tokens at which the ratio was clipped"),
    ("skipped_steps", "skipped steps", "updates skipped because the gradient was not finite"),
)


def report_from_directory(run: str | Path) -> Path:
    """Draw the learning curve and write the report of a run, finished or not, from its directory.

    Raises:
        Refused: the directory holds no metrics.jsonl.
    """
    run = Path(run)
    if not (run / "metrics.jsonl").is_file():
        raise Refused(f"{run} holds no metrics.jsonl; give the output directory of a run.")
    metrics = read_metrics(run / "metrics.jsonl")
    config = read_config(run) if (run / "config.json").is_file() else {}
    ended = run / "summary.json"
    summary = json.loads(ended.read_text("utf-8")) if ended.is_file() else {}
    files = sorted((run / "completions").glob("step_*.parquet"), key=lambda file: int(file.stem[5:]))
    completions = {int(file.stem[5:]): read_completions(file) for file in _ends(files)}
    title = str(config.get("title") or run.resolve().name)
    solved = config.get("solved")
    plot = learning_curve(
        run / "learning_curve.png",
        metrics,
        title=title,
        subtitle=ending(summary),
        solved=float(solved) if isinstance(solved, (int, float)) else None,
        curve=("loss", "loss, nats per token") if config.get("kind") == "sft" else ("reward", "mean reward"),
    )
    return write_report(
        run / "report.html", config=config, metrics=metrics, summary=summary, completions=completions,
        plot_path=plot, title=title,
    )  # fmt: skip


def write_report(
    path: Path,
    *,
    config: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    completions: Mapping[int, Sequence[Mapping[str, Any]]],
    plot_path: Path | None,
    title: str,
) -> Path:
    """Write one self-contained HTML file. Every text that comes from data, model or user is escaped.

    Args:
        path: where to write the file.
        config: content of config.json; "versions" and "command" are shown in sections of their own.
        metrics: rows of metrics.jsonl.
        summary: content of summary.json; empty for a run that has not ended. Its `verdict`, a sentence on the
            result, is shown below the heading if it has one.
        completions: sample rows by step; the first and the last step are shown.
        plot_path: a PNG to embed; None for no figure.
        title: heading of the page.
    """
    settings = {key: value for key, value in config.items() if key not in ("versions", "command")}
    command = config.get("command", f"tokenrl train --config {path.parent / 'config.json'}") or _FROM_PYTHON
    command = command if isinstance(command, str) else " ".join(map(str, command))
    sections = [
        f"<h1>{escape(title)}</h1><p class=soft>{escape(ending(summary))}</p>",
        f"<p><b>{escape(str(summary['verdict']))}</b></p>" if "verdict" in summary else "",
        _headline(summary),
        _image(plot_path),
        _section("Diagnostics", _diagnostics(metrics)),
        *(
            _section(f"Completions at step {step}", _samples(completions[step]))
            for step in _ends(sorted(completions))
        ),
        _section("How the model was asked", _asked(config)),
        _section("To repeat", f"<pre>{escape(command)}</pre>"),
        _section("Configuration", f"<pre>{_json(settings)}</pre>"),
        _section("Versions", f"<pre>{_json(config.get('versions', {}))}</pre>"),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    write_text(path, page)
    return path


def _section(heading: str, body: str) -> str:
    return f'<h2>{escape(heading)}</h2><div class="wide">{body}</div>' if body else ""


def _headline(summary: Mapping[str, Any]) -> str:
    before, after = summary.get("eval_before") or {}, summary.get("eval_after") or {}
    names = dict.fromkeys([*before, *after])
    first = [name for name in ("reward_greedy", "reward") if name in names]  # the most important come first
    cards = "".join(
        f'<div class="card"><span class="soft">{escape(key.replace("_", " "))}</span>'
        f"<b>{escape(number(before.get(key)))} → {escape(number(after.get(key)))}</b></div>"
        for key in dict.fromkeys([*first, *names])
    )
    return _section(
        "Held-out evaluation, before → after training", cards and f'<div class="cards">{cards}</div>'
    )


def _image(plot_path: Path | None) -> str:
    if plot_path is None:
        return ""
    data = base64.b64encode(plot_path.read_bytes()).decode("ascii")
    return _section(
        "Learning curve", f'<img alt="reward and diagnostics per step" src="data:image/png;base64,{data}">'
    )


def _diagnostics(metrics: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for key, name, meaning in _DIAGNOSTICS:
        _, values = series(metrics, key)
        if values:
            numbers = (values[0], values[-1], min(values), max(values))
            rows.append([name, *map(number, numbers), meaning])
    header = ("", "first", "last", "lowest", "highest", "what it says")
    return _table(header, rows, numeric=range(1, 5)) if rows else ""


def _asked(config: Mapping[str, Any]) -> str:
    """Return the form of prompts, where it was set: system prompt, chat form, and what ends completions."""
    names = ("system_prompt", "chat", "chat_template_kwargs", "stop")
    rows = [
        [name.replace("_", " "), json.dumps(config[name], ensure_ascii=False)]
        for name in names
        if config.get(name)
    ]
    return _table(("setting", "value"), rows, numeric=()) if rows else ""


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [
        [number(row.get(name)) if not isinstance(row.get(name), str) else row[name] for name in names]
        for row in rows[:16]
    ]
    numeric = [i for i, name in enumerate(names) if not any(isinstance(row.get(name), str) for row in rows)]
    return _table(names, cells, numeric=numeric) if rows else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numeric: Sequence[int]) -> str:
    kinds = ["n" if column in numeric else "text" for column in range(len(header))]
    head = "".join(
        f'<th class="{kind}">{escape(name)}</th>' for kind, name in zip(kinds, header, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{kind}">{escape(c)}</td>' for kind, c in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _ends(items: list[T]) -> list[T]:
    """Return the first and the last item, or the only one."""
    return items[:1] + items[1:][-1:]


def _json(value: Any) -> str:
    return escape(json.dumps(plain(value), indent=2, sort_keys=True, ensure_ascii=False))
