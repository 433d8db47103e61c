"""Writes the numbers of a table of presets, and draws them: what each declares, and what enumeration finds.

    python recipes/enumeration/estimators_table.py

`recipes/pages/explain/estimators.md`, where only the last three cells of each preset's row are replaced, and
`recipes/figures/map.png` are its output. `recipes/pages/explain/defaults.md` has the command for its own table.
With `--output` another file is written, and with `--estimators` the table has these presets only.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import re
from pathlib import Path
from statistics import median

import numpy as np
import tyro
from figures import save
from matplotlib.figure import Figure

from tokenrl import measure_bias
from tokenrl.lab import Verdict

RECIPES = Path(__file__).parents[1]
PAGE = RECIPES / "pages" / "explain" / "estimators.md"
COLOURS = {  # of Okabe and Ito
    "exact": "#009E73",
    "exact_up_to_scale": "#0072B2",
    "exact_per_prompt": "#CC79A7",
    "asymptotic": "#E69F00",
    "biased": "#D55E00",
}
ROW = re.compile(r"(\| `(\w+)` \| .*? \|)(?: [^|]* \|){3}")


def beside_rloo(verdict: Verdict, rloo: Verdict) -> list[float]:
    """Return the noise of an estimator over that of RLOO, on each problem that both can be used on."""
    noises = {moments.problem: moments.noise for moments in rloo.measurements}
    return [m.noise / noises[m.problem] for m in verdict.measurements if m.problem in noises]


def numbers(verdict: Verdict, rloo: Verdict) -> str:
    """Return the cosine, and of the noise over that of RLOO the median, the least and the most, as cells."""
    noise = "-"  # with another objective it belongs to another gradient
    if verdict.of_reward is None:
        ratios = beside_rloo(verdict, rloo)
        noise = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{verdict.cosine:.3f} | {noise} |"


def draw(verdicts: dict[str, Verdict], rloo: Verdict, output: Path) -> None:
    """Draw the angle between E[g] and grad J on each problem, and the noise over that of RLOO."""
    figure = Figure(figsize=(11, 1.4 + 0.24 * len(verdicts)), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    for height, verdict in enumerate(reversed(verdicts.values())):
        look = {"color": COLOURS[verdict.found], "linewidth": 1.2, "marker": "o", "mec": "white"}
        cosines = np.clip([moments.cosine for moments in verdict.measurements], -1, 1)
        for axes, values in (
            (left, np.degrees(np.arccos(cosines))),
            (right, beside_rloo(verdict, rloo)),
        ):
            axes.plot(values, [height] * len(values), markersize=7, **look)
    left.set_yticks(range(len(verdicts)), list(reversed(verdicts)))
    left.set_xlabel("degrees between E[g] and grad J: a point a problem, steps of 2 to 8 rows")
    right.set(xscale="log", xlabel="noise over that of RLOO, by problem")
    right.xaxis.set_major_formatter("{x:g}")
    for status in dict.fromkeys(verdict.found for verdict in verdicts.values()):
        left.scatter([], [], color=COLOURS[status], label=status)
    figure.legend(loc="outside upper left", ncols=5, frameon=False, fontsize=9)
    save(figure, output)


def main(
    page: Path = PAGE,
    output: Path | None = None,
    figure: Path = RECIPES / "figures" / "map.png",
    estimators: tuple[str, ...] = (),
) -> None:
    """Write the page and the figure. The other cells of each preset's row are in the page already."""
    rloo = measure_bias("rloo")
    verdicts, lines = {}, []
    for line in page.read_text(encoding="utf-8").splitlines():
        found = ROW.fullmatch(line)
        if found is None:
            lines.append(line)
        elif not estimators or found[2] in estimators:
            verdict = verdicts[found[2]] = measure_bias(found[2])
            lines.append(f"{found[1]} {verdict.declared} | {numbers(verdict, rloo)}")
    (output or page).write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw({name: x for name, x in verdicts.items() if x.of_reward is None}, rloo, figure)
    print(f"{output or page}: {len(verdicts)} presets")


if __name__ == "__main__":
    tyro.cli(main)
