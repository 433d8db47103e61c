"""Draws a forest plot: one line for each paired difference, with both of its intervals.

The bars are drawn in boxes that the browser stretches to the width of the page, and all text is HTML beside
them, so that the plot is as legible on a phone as on a large screen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tokenrl.lab.compare.statistics.found import Difference, Family
from tokenrl.lab.compare.statistics.words import shown, signed
from tokenrl.runs.charts import ticks
from tokenrl.runs.page import Html, tag

COLOURS = {"better": 3, "worse": 2, "equivalent": 1}
"""Colours of the verdicts in the palette of page.css; the others are grey."""


def forest(family: Family, unit: str) -> Html:
    """Draw the differences of a family, and below them the reference against itself.

    Args:
        family: the comparisons on one problem.
        unit: the score that is compared, in words.
    """
    ours = family.differences
    every = [*ours, *([family.itself] if family.itself else [])]
    low, high = _range(every, family.margin)
    rows = [_row(one, one.verdict, COLOURS.get(one.verdict, 0), low, high, family.margin) for one in ours]
    if family.itself:
        rows.append(_row(family.itself, "same arm", 0, low, high, family.margin))
    return tag(
        "div", tag("p", _explained(family, unit), class_="soft"), *rows, _axis(low, high), class_="forest"
    )


def _explained(family: Family, unit: str) -> str:
    """Say what the bars show."""
    level = family.differences[0].level
    text = (
        f"Difference in the {unit}, paired by seed: small dots, the seeds; dot, their mean; thick bar, "
        f"95 % interval; thin bar, the interval at {level:.2%}, which decides."
    )
    if family.margin is not None:
        text += f" The shaded band is the margin of equivalence, {shown(family.margin)} to either side of 0."
    if family.itself:
        itself = f"{family.reference} against itself on other seeds"
        text += f" The last line is {itself}: what no difference looks like."
    return text


def _range(every: Sequence[Difference], margin: float | None) -> tuple[float, float]:
    """Return ends of the axis that hold 0, the margin and all intervals."""
    ends = [0.0, margin or 0.0, -(margin or 0.0)]
    for one in every:
        ends += [x for x in (*one.adjusted, *one.mean, *one.differences.values()) if math.isfinite(x)]
    space = 0.05 * (max(ends) - min(ends)) or 1.0
    return min(ends) - space, max(ends) + space


def _row(found: Difference, said: str, colour: int, low: float, high: float, margin: float | None) -> Html:
    """Draw one difference; `said` stands at its end."""

    def across(value: float) -> float:
        return 1000 * (value - low) / (high - low)

    def line(ends: Sequence[float], **attributes: object) -> Iterator[Html]:
        if all(map(math.isfinite, ends)):
            yield tag("path", d=f"M{across(ends[0]):.1f},50H{across(ends[1]):.1f}", **attributes)

    parts = [tag("path", d=f"M{across(0):.1f},0V100", class_="zero")]
    if margin is not None:
        width = across(margin) - across(-margin)
        band = tag("rect", x=f"{across(-margin):.1f}", y=0, width=f"{width:.1f}", height=100, class_="margin")
        parts.insert(0, band)
    for apart in found.differences.values():
        parts.append(tag("path", d=f"M{across(apart):.1f},82h0", class_="seed"))
    parts += line(found.adjusted[1:])
    parts += line(found.mean[1:], class_="thick")
    parts.append(tag("path", d=f"M{across(found.mean.value):.1f},50h0", class_="dot"))
    numbers = signed(found)
    drawing = tag("svg", *parts, viewBox="0 0 1000 100", preserveAspectRatio="none", role="img",
                  aria_label=f"{found.arm}: {numbers}")  # fmt: skip
    return tag(
        "div",
        tag("span", found.arm, class_="arm"),
        tag("div", drawing, class_="bar"),
        tag("span", tag("b", said), " ", tag("span", numbers, class_="soft"), class_="said"),
        class_="row",
        style=f"--colour:var(--c{colour})",
    )


def _axis(low: float, high: float) -> Html:
    labels = [
        tag("span", f"{tick:g}", class_="x", style=f"left:{100 * (tick - low) / (high - low):.1f}%")
        for tick in ticks(low, high, 4)
    ]
    return tag("div", tag("span", class_="arm"), tag("div", *labels, class_="bar axis"), class_="row")
