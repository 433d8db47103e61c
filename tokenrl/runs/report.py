"""Writes the report of a run: one self-contained HTML file, made from the files of the run directory."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenrl.runs.console import ending, number, with_errors
from tokenrl.runs.page import Html, preformatted, section, table, tag, write_page
from tokenrl.runs.panels import learning_curves
from tokenrl.runs.plots import learning_curve
from tokenrl.runs.reader import RecordedRun, read_run, series
from tokenrl.runs.samples import completions_section

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
    ("idle_steps", "idle steps", "updates without any gradient, which left the weights alone"),
)


def report_from_directory(run: str | Path) -> Path:
    """Draw the learning curve and write the report of a run, finished or not, from its directory.

    Raises:
        Refused: the directory holds no metrics.jsonl.
    """
    found = read_run(run)
    unrewarded = found.kind == "sft" and not series(found.metrics, "eval_reward")[0]
    learning_curve(
        found.path / "learning_curve.png",
        found.metrics,
        title=found.title,
        subtitle=ending(found.summary),
        solved=found.mark[1] if found.mark else None,
        curve=("loss", "loss, nats per token") if unrewarded else ("reward", "mean reward"),
    )
    return write_report(found)


def write_report(run: RecordedRun, *charts: Html) -> Path:
    """Write report.html into the directory of a run: one self-contained file.

    Args:
        run: the run. Its summary may have a `verdict`, a sentence on the result, which is shown on top.
        *charts: further charts, which follow the learning curve.
    """
    config, summary = run.config, run.summary
    settings = {key: value for key, value in config.items() if key not in ("versions", "command")}
    command = config.get("command", f"tokenrl {run.kind} --config {run.path / 'config.json'}") or _FROM_PYTHON
    warm = summary.get("warm_started") or {}
    return write_page(
        run.path / "report.html",
        run.title,
        tag("p", ending(summary), class_="soft"),
        tag("p", tag("b", str(summary["verdict"]))) if "verdict" in summary else "",
        tag("p", f"Warm start on demonstrations: {warm['in_words']}.") if warm else "",
        _headline(summary),
        learning_curves(run.metrics, run.kind, run.mark),
        *charts,
        section("Diagnostics", _diagnostics(run.metrics)),
        section(
            "To repeat", preformatted(command if isinstance(command, str) else " ".join(map(str, command)))
        ),
        section("How the model was asked", _asked(config)),
        section("Configuration", preformatted(settings), closed=True),
        section("Versions", preformatted(config.get("versions", {})), closed=True),
        completions_section(run.path / "completions"),
    )


def _headline(summary: Mapping[str, Any]) -> Html:
    before, after = (with_errors(summary.get(name) or {}) for name in ("eval_before", "eval_after"))
    cards = [
        tag("div", tag("span", name, class_="soft"),
            tag("b", tag("span", before.get(name, "-")), " → ", tag("span", after.get(name, "-"))),
            class_="card")
        for name in dict.fromkeys([*before, *after])
    ]  # fmt: skip
    heading = "Held-out evaluation, before → after training (± standard error)"
    return section(heading, tag("div", *cards, class_="cards")) if cards else Html()


def _diagnostics(metrics: Sequence[Mapping[str, Any]]) -> Html:
    rows = []
    for key, name, meaning in _DIAGNOSTICS:
        _, values = series(metrics, key)
        _, clipped = series(metrics, "grad_clipped") if key == "grad_norm" else ((), ())
        if clipped:
            meaning = f"{meaning}, which {fmean(clipped):.0%} of the updates needed"
        if values:
            numbers = (values[0], values[-1], min(values), max(values))
            rows.append([name, *map(number, numbers), meaning])
    header = ("", "first", "last", "lowest", "highest", "what it says")
    return tag("div", table(header, rows), class_="words") if rows else Html()


def _asked(config: Mapping[str, Any]) -> Html:
    """Return the form of prompts, where it was set: system prompt, chat form, and what ends completions."""
    names = ("system_prompt", "chat", "chat_template_kwargs", "stop")
    rows = [[name, json.dumps(config[name], ensure_ascii=False)] for name in names if config.get(name)]
    return tag("div", table(("setting", "value"), rows), class_="words") if rows else Html()
