"""Writes the table of presets of papers: what each declares of its gradient, and what enumeration finds.

`recipes/pages/explain/estimators.md` is its output. Only the table is replaced; the text above and below it stays.
With `--output` another file is written, and with `--estimators` the table has these presets only.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from collections.abc import Iterator
from pathlib import Path

import tyro

from tokenrl import Estimator, measure_bias
from tokenrl.core import PRESETS

PAGE = Path(__file__).parents[1] / "pages" / "explain" / "estimators.md"
# defaults.py has the others
PAPERS = tuple(name for name, preset in PRESETS.items() if not preset.beyond)
HEAD = "| preset | baseline | scale | aggregation | ratio | expected gradient | cosine | noise |"


def rows(estimators: tuple[str, ...]) -> Iterator[str]:
    """Yield the lines of the table: the head, and one line for each preset."""
    yield HEAD
    yield "|---|---|---|---|---|---|---|---|"
    for name in estimators:
        e = Estimator.preset(name)
        verdict = measure_bias(e)
        yield (
            f"| `{name}` | {e.baseline} | {e.scale} | {e.aggregation} | {e.ratio} | {e.bias_status} "
            f"| {verdict.cosine:.3f} | {verdict.noise:.2f} |"
        )


def main(output: Path = PAGE, estimators: tuple[str, ...] = PAPERS) -> None:
    """Write the page."""
    above, _, rest = PAGE.read_text(encoding="utf-8").partition(HEAD)
    below = rest.partition("\n\n")[2]
    table = "\n".join(rows(estimators))
    output.write_text(f"{above}{table}\n\n{below}", encoding="utf-8")
    print(f"{output}: {len(estimators)} presets")


if __name__ == "__main__":
    tyro.cli(main)
