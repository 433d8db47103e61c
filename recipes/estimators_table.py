"""Makes recipes/estimators.md again: every preset, what it declares, and what enumeration finds.

Only the table is replaced; the words above it stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenrl import Estimator, measure_bias
from tokenrl.core import PRESETS

PAGE = Path(__file__).with_name("estimators.md")
HEAD = "| preset | baseline | scale | aggregation | ratio | expected gradient | cosine | noise |"


def rows() -> Iterator[str]:
    """The table, a line a preset."""
    yield HEAD
    yield "|---|---|---|---|---|---|---|---|"
    for name in PRESETS:
        e = Estimator.preset(name)
        verdict = measure_bias(e)
        yield (
            f"| `{name}` | {e.baseline} | {e.scale} | {e.aggregation} | {e.ratio} | {e.bias_status} "
            f"| {verdict.cosine:.3f} | {verdict.noise:.2f} |"
        )


def main() -> None:
    """Write the page."""
    words = PAGE.read_text(encoding="utf-8").partition(HEAD)[0]
    PAGE.write_text(words + "\n".join(rows()) + "\n", encoding="utf-8")
    print(f"{PAGE.name}: {len(PRESETS)} presets")


if __name__ == "__main__":
    main()
