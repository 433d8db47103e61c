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

import tyro

from tokenrl import Estimator, measure_bias
from tokenrl.core import PRESETS

PAGE = Path(__file__).parents[1] / "pages" / "explain" / "estimators.md"
# The presets of toolkits are in defaults.md, those with a KL to a teacher in distillation.md.
PAPERS = tuple(name for name, p in PRESETS.items() if not (p.beyond or "beta" in p.fields))
ROW = re.compile(r"(\| `(\w+)` \| .*? \|)(?: [^|]* \|){3}")


def with_numbers(row: str, name: str) -> str:
    """Return the row of a preset, with its declared bias, cosine and noise added."""
    estimator = Estimator.preset(name)
    verdict = measure_bias(estimator)
    return f"{row} {estimator.bias_status} | {verdict.cosine:.3f} | {verdict.noise:.2f} |"


def main(output: Path = PAGE, estimators: tuple[str, ...] = PAPERS) -> None:
    """Write the page. The name and the formula of each preset are in the page already."""
    lines = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        found = ROW.fullmatch(line)
        if found is None:
            lines.append(line)
        elif found[2] in estimators:
            lines.append(with_numbers(*found.groups()))
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{output}: {len(estimators)} presets")


if __name__ == "__main__":
    tyro.cli(main)
