"""Runs `tokenrl lab exact`: prints a table, writes records, draws a map of noise against bias."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tokenrl.core.choices import EXACT, FROM_BEST_TO_WORST, UP_TO_SCALE
from tokenrl.errors import Refused
from tokenrl.lab.exact.arguments import LabArguments
from tokenrl.lab.exact.catalogue import named_estimators
from tokenrl.lab.exact.discounting import Match, objectives_on_control
from tokenrl.lab.exact.verdict import Verdict, measure_bias
from tokenrl.runs.console import rich_console, rich_table
from tokenrl.runs.files import check_place, write_text
from tokenrl.runs.plots import save_figure
from tokenrl.runs.threads import using_threads

# The palette of Okabe and Ito, which is readable with any colour vision.
COLOURS = dict(
    zip(FROM_BEST_TO_WORST, ("#009E73", "#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#8A8A8A"), strict=True)
)

FIGURES = (".png", ".svg", ".pdf")


def exact(args: LabArguments) -> int:
    """Measure the estimators, print the tables and write the files.

    Returns:
        The exit code: 1 if any declaration is wrong, else 0.

    Raises:
        Refused: For an unknown estimator, or a file that cannot be written.
    """
    chosen = named_estimators()
    if unknown := [name for name in args.estimators if name not in chosen]:
        raise Refused(f"The lab knows no estimator {unknown[0]!r}; it knows: {'; '.join(chosen)}.")
    for path in (args.json, args.figure):
        if path is not None:
            check_place(path)
    if args.figure is not None and args.figure.suffix not in FIGURES:
        raise Refused(f"{args.figure} cannot be drawn: its name must end in one of {', '.join(FIGURES)}.")
    with using_threads(1):  # many small sums, which a second thread only slows down
        verdicts = {
            name: measure_bias(e)
            for name, e in chosen.items()
            if not args.estimators or name in args.estimators
        }
    print_table(verdicts)
    if not args.estimators:
        print_objectives()
    if args.json is not None:
        write_text(args.json, json.dumps(records(verdicts), indent=1, allow_nan=False) + "\n")
    if args.figure is not None:
        draw_map(verdicts, args.figure)
    return 0 if all(v.ok for v in verdicts.values()) else 1


def records(verdicts: Mapping[str, Verdict]) -> list[dict[str, Any]]:
    """Return one record per estimator, for JSON.

    `cosine` is the lowest and `relative_bias` the largest over the problems. `variance` and `noise` are those
    of the first problem; `noise` is None if the expected gradient is 0. `problems` has the numbers of each.
    """
    return [
        {
            "estimator": name,
            "declared": v.declared,
            "found": v.found,
            "cosine": v.cosine,
            "relative_bias": v.relative_bias,
            "variance": v.variance,
            "noise": _finite(v.noise),
            "ok": v.ok,
            "problems": [{**asdict(m), "noise": _finite(m.noise)} for m in v.measurements],
        }
        for name, v in verdicts.items()
    ]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def print_table(verdicts: Mapping[str, Verdict]) -> None:
    """Print one line per estimator, and below it what the columns mean."""
    console = rich_console(width=120)
    heads = ("estimator", "declared", "found"), ("cosine", "relative bias", "noise", "ok")
    table = rich_table("", *heads, no_wrap=True)
    for name, v in verdicts.items():
        bias = f"{v.relative_bias:.1e}" if v.relative_bias < 1e-3 else f"{v.relative_bias:.3f}"
        row = (name, v.declared, v.found, f"{v.cosine:.6f}", bias, f"{v.noise:.2f}", "yes" if v.ok else "NO")
        table.add_row(*row, style=None if v.ok else "bold red")
    console.print(table)
    wrong = [name for name, v in verdicts.items() if not v.ok]
    console.print(
        "cosine: between the expected gradient and that of J, the lowest over the problems; relative bias: "
        "|E g - grad J| / |grad J|, the largest, a wrong scale included; noise: tr Var g / |E g|^2 on the "
        f"first problem.\n{len(verdicts)} estimators; "
        + (f"declared wrongly: {'; '.join(wrong)}." if wrong else "every declaration holds.")
    )


def print_objectives() -> None:
    """Print which objective each choice of returns and baseline ascends on a small control problem."""
    heads = ("on a control problem of 3 steps", "gamma", "of J_1", "of J_gamma", "ascends")
    table = rich_table("", heads, no_wrap=True)
    for name, gamma, found in objectives_on_control():
        discounted = _against(found.discounted) if gamma < 1 else "the same"
        table.add_row(name, f"{gamma:g}", _against(found.undiscounted), discounted, found.ascends)
    console = rich_console(width=120)
    console.print(table)
    console.print(
        "The expected gradient compared with those of J_1 = E[sum r_t] and J_gamma = E[sum gamma^t r_t]; off "
        "by: |E g - grad J| / |grad J|, and the cosine. There are two episodes per step. V^pi is the value "
        "of the state and the steps left; any V is a random number per state. Cut: 2 of 4 steps are seen, "
        "and J is that of all 4, through the actions before the cut. 'Timestep mean of all' tends to J_1 "
        "with more episodes."
    )


def _against(match: Match) -> str:
    if match.status == EXACT:
        return "the gradient"
    if match.status == UP_TO_SCALE:
        return f"{match.scale:.3f} of it"
    return f"off by {match.relative_bias:.3f}, cos {match.cosine:.4f}"


def draw_map(verdicts: Mapping[str, Verdict], path: Path) -> Path:
    """Draw each estimator's noise against the angle of its bias, both on the first problem.

    Estimators at the same place share a number; the list at the right names them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9), dpi=100, facecolor="white")
    axes = figure.add_axes((0.05, 0.07, 0.62, 0.87))
    listing = figure.add_axes((0.69, 0.07, 0.31, 0.87))
    listing.axis("off")
    spots = sorted(_spots(verdicts).items(), key=lambda item: -item[0][1])
    for number, ((angle, noise, found), names) in enumerate(spots, start=1):
        colour = COLOURS[found]
        axes.scatter([angle], [noise], color=colour, s=190, alpha=0.85, linewidths=0, zorder=3)
        axes.annotate(str(number), (angle, noise), ha="center", va="center", fontsize=7.5, color="white",
                      fontweight="bold", zorder=4)  # fmt: skip
        height = 1 - number / (len(spots) + 1)
        listing.text(0, height, str(number), color=colour, fontsize=8, fontweight="bold", ha="right")
        listing.text(0.02, height, _shortened(names), color="#222222", fontsize=8)
    for status in dict.fromkeys(sorted((v.found for v in verdicts.values()), key=FROM_BEST_TO_WORST.index)):
        axes.scatter([], [], color=COLOURS[status], s=60, label=status)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("angle between the expected gradient and the gradient of J, degrees")
    axes.set_ylabel("noise: tr Var g / |E g|²")
    axes.set_title("Bias and noise of every estimator: further left is truer, lower is quieter", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#E8E8E8", linewidth=0.8)
    if spots:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.06, 1.0), title="found")
    save_figure(figure, path)
    return path


def _spots(verdicts: Mapping[str, Verdict]) -> dict[tuple[float, float, str], list[str]]:
    """Group names by (angle in degrees, noise, status), rounded; leave out those without a gradient."""
    spots: dict[tuple[float, float, str], list[str]] = {}
    for name, v in verdicts.items():
        first = v.measurements[0]
        if math.isfinite(first.noise) and first.noise > 0:
            angle = math.degrees(math.acos(max(-1.0, min(1.0, first.cosine))))
            spot = (round(angle, 2), float(f"{first.noise:.3g}"), v.found)
            spots.setdefault(spot, []).append(name)
    return spots


def _shortened(names: Sequence[str]) -> str:
    text = ", ".join(names)
    return text if len(text) <= 62 else text[:61] + "…"
