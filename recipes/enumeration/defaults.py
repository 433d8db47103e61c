"""Writes the table of what the defaults of other toolkits compute, and draws it.

It makes `recipes/pages/explain/defaults.md`, of which only the table is replaced, and `recipes/figures/defaults.png`.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from pathlib import Path

import tyro
from estimators_table import draw, numbers

from tokenrl import Estimator, measure_bias
from tokenrl.core import PRESETS
from tokenrl.lab import Verdict

RECIPES = Path(__file__).parents[1]
PAGE = RECIPES / "pages" / "explain" / "defaults.md"
HEAD = "| preset | baseline / scale | aggregation | ratio | KL | expected gradient | cosine | noise / RLOO's |"
TOOLKITS = tuple(name for name, preset in PRESETS.items() if preset.beyond)


def row(name: str, verdict: Verdict, rloo: Verdict) -> str:
    """Return the line of the table for a preset: its choices, and what enumeration finds."""
    e = Estimator.preset(name)
    kl = f"{e.kl_estimator} in the {e.kl_placement}, {e.beta:g}" if e.beta else "none"
    aggregation = e.aggregation + ", zero spread dropped" * (e.zero_spread == "drop")
    return (
        f"| `{name}` | {e.baseline} / {e.scale} | {aggregation} | {e.ratio} | {kl} "
        f"| {verdict.found} | {numbers(verdict, rloo)}"
    )


def main(
    output: Path = PAGE,
    figure: Path = RECIPES / "figures" / "defaults.png",
    estimators: tuple[str, ...] = (*TOOLKITS, "dr_grpo", "rloo"),
) -> None:
    """Write the page and the figure."""
    rloo = measure_bias("rloo")
    verdicts = {name: measure_bias(name) for name in estimators}
    rows = [row(*entry, rloo) for entry in verdicts.items()]
    table = "\n".join([HEAD, "|---|---|---|---|---|---|---|---|", *rows])
    above, _, rest = PAGE.read_text(encoding="utf-8").partition(HEAD)
    below = rest.partition("\n\n")[2]
    output.write_text(f"{above}{table}\n\n{below}", encoding="utf-8")
    draw(verdicts, rloo, figure)
    print(f"{output}: {len(estimators)} presets")


if __name__ == "__main__":
    tyro.cli(main)
