"""Writes the numbers of the table of presets: what each declares of its gradient, and what enumeration finds.

`recipes/pages/explain/estimators.md` is its output. Only the last three cells of each preset's row are replaced.
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

import tyro

from tokenrl import measure_bias
from tokenrl.core import PRESETS
from tokenrl.lab import Verdict

PAGE = Path(__file__).parents[1] / "pages" / "explain" / "estimators.md"
# The presets of toolkits are in defaults.md, those with a KL to a teacher in distillation.md.
PAPERS = tuple(
    name
    for name, p in PRESETS.items()
    if not (p.beyond or {"beta", "kl_placement"} <= p.fields.keys())
)
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


def main(output: Path = PAGE, estimators: tuple[str, ...] = PAPERS) -> None:
    """Write the page. The name and the formula of each preset are in the page already."""
    rloo = measure_bias("rloo")
    lines = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        found = ROW.fullmatch(line)
        if found is None:
            lines.append(line)
        elif found[2] in estimators:
            verdict = measure_bias(found[2])
            lines.append(f"{found[1]} {verdict.declared} | {numbers(verdict, rloo)}")
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{output}: {len(estimators)} presets")


if __name__ == "__main__":
    tyro.cli(main)
