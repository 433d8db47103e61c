"""Writes the table of what the defaults of other toolkits compute, and draws it.

It makes `recipes/pages/explain/defaults.md`, of which only the table is replaced, and `recipes/figures/defaults.png`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import math
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from tokenrl import Estimator, measure_bias
from tokenrl.core import PRESETS
from tokenrl.lab import Verdict

RECIPES = Path(__file__).parents[1]
HEAD = (
    "| preset | baseline / scale | aggregation | ratio | KL | expected gradient | cosine | noise |"
)
COLOURS = {  # of Okabe and Ito
    "exact": "#009E73",
    "exact_up_to_scale": "#0072B2",
    "exact_per_prompt": "#CC79A7",
    "asymptotic": "#E69F00",
    "biased": "#D55E00",
}
TOOLKITS = tuple(name for name, preset in PRESETS.items() if preset.beyond)


def row(name: str, verdict: Verdict) -> str:
    """Return the line of the table for a preset: its choices, and what enumeration finds."""
    e = Estimator.preset(name)
    kl = f"{e.kl_estimator} in the {e.kl_placement}, {e.beta:g}" if e.beta else "none"
    aggregation = e.aggregation + ", zero spread dropped" * (e.zero_spread == "drop")
    return (
        f"| `{name}` | {e.baseline} / {e.scale} | {aggregation} | {e.ratio} | {kl} "
        f"| {verdict.found} | {verdict.cosine:.3f} | {verdict.noise:.2f} |"
    )


def draw(verdicts: dict[str, Verdict], output: Path) -> None:
    """Draw the angle between E[g] and grad J on each problem, and the noise."""
    figure = Figure(figsize=(11, 4.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for height, verdict in enumerate(reversed(verdicts.values())):
        cosines = [max(-1.0, min(1.0, moments.cosine)) for moments in verdict.measurements]
        angles = [math.degrees(math.acos(cosine)) for cosine in cosines]
        colour = COLOURS[verdict.found]
        left.plot([0, max(angles)], [height, height], color=colour, linewidth=1.2)
        left.scatter(
            angles, [height] * len(angles), color=colour, edgecolors="white", s=50, zorder=3
        )
        right.barh(height, verdict.noise, color=colour, height=0.6)
    left.set_yticks(range(len(verdicts)), list(reversed(verdicts)))
    left.set_xlabel("degrees between E[g] and grad J: a point a problem, steps of 2 to 8 rows")
    right.set_xlabel("noise: tr Var g / |E g|² on the first problem")
    for status in dict.fromkeys(verdict.found for verdict in verdicts.values()):
        remark = ": shrinks as more rows are divided together" * (status == "asymptotic")
        left.scatter([], [], color=COLOURS[status], label=status + remark)
    left.legend(frameon=False, loc="lower right", fontsize=9)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#EAEAEA", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(output)


def main(
    output: Path = RECIPES / "pages" / "explain" / "defaults.md",
    figure: Path = RECIPES / "figures" / "defaults.png",
    estimators: tuple[str, ...] = (*TOOLKITS, "dr_grpo", "rloo"),
) -> None:
    """Write the page and the figure."""
    verdicts = {name: measure_bias(name) for name in estimators}
    table = "\n".join(
        [HEAD, "|---|---|---|---|---|---|---|---|", *(row(*entry) for entry in verdicts.items())]
    )
    above, _, rest = (
        (RECIPES / "pages" / "explain" / "defaults.md").read_text(encoding="utf-8").partition(HEAD)
    )
    below = rest.partition("\n\n")[2]
    output.write_text(f"{above}{table}\n\n{below}", encoding="utf-8")
    draw(verdicts, figure)
    print(f"{output}, {figure}: {len(estimators)} presets")


if __name__ == "__main__":
    tyro.cli(main)
