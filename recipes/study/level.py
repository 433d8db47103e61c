"""Measures how often the intervals of questions 12 and 13 miss, in families whose arms are truly the same.

    python recipes/study/level.py     in some minutes

A family is drawn with the means and the covariance of the measured areas. Then it is judged as the study judges
(`choice.py`): rates are chosen on the drawn units, and the critical values are simulated from them. Printed are
the share of the families in which some interval misses, and the share for each interval; first with Student's
critical value, then with the simulated ones.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import numpy as np
from choice import differences, half_widths, redrawn
from judging import half_width
from second_edition import by_unit

FAMILIES = 1000
if __name__ == "__main__":
    for part in ("12_sort_digits", "12_reverse_text", "12_countdown", "13_molecules"):
        arms = by_unit(part).values()
        units = differences(arms).shape[1]
        normals = np.random.default_rng(1).standard_normal((units, FAMILIES, units))
        drawn = [redrawn(scores, normals) for scores in arms]
        gaps = differences(drawn)
        halves = []
        for family in range(FAMILIES):
            halves.append(half_widths([scores[:, :, family] for scores in drawn], draws=2000))
        for half in (half_width(gaps.std(-1, ddof=1), units, 5), np.transpose(halves)):
            missed = np.abs(gaps.mean(-1)) > half
            print(part, missed.any(0).mean(), missed.mean(1))
