"""The recipe that compares baselines runs as a program, shortened, and leaves its report."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[3] / "recipes"


@pytest.mark.slow
def test_the_recipe_runs(tmp_path):
    flags = "--tasks sort_digits --arms rloo grpo --seeds 2 --max-steps 2 --output-dir found"
    done = subprocess.run(
        [sys.executable, RECIPES / "compare_baselines.py", *flags.split()],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"sort_digits: grpo against rloo: [+-]\d\.\d+ \[.*\] descriptive", done.stdout)
    assert (tmp_path / "found" / "report.html").is_file()


def test_its_page_is_the_one_of_the_full_comparison():
    """The page in the repository is of the program's defaults: two tasks, four arms, six seeds."""
    page = (RECIPES / "compare_baselines.html").read_text()
    assert page.count('<div class="card verdict">') == 2
    assert "48 runs over 6 seeds, none of them failed" in page
    assert "/home/" not in page and "/tmp/" not in page
