"""README and pages: tables are what the code says and the lab finds."""

from __future__ import annotations

import re
import runpy
from collections import Counter

import pytest
from folders import RECIPES, ROOT

from tokenrl.core import PRESETS, Estimator
from tokenrl.lab import measure_bias, named_estimators
from tokenrl.lab.exact.verdict import default_problems

FOLDER = RECIPES / "pages"
README, ALL = (ROOT / "README.md").read_text(), (FOLDER / "explain" / "estimators.md").read_text()
CHOOSE = (FOLDER / "guides" / "choose.md").read_text()


def axes(name):
    e = Estimator.preset(name)
    return f"| `{name}` | {e.baseline} | {e.scale} | {e.aggregation} | {e.ratio} |"


def named(page):
    return re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)


# the others are in defaults.md and, without a reward, in distillation.md
PAPERS = [
    name
    for name, p in PRESETS.items()
    if not (p.beyond or {"beta", "kl_placement"} <= p.fields.keys())
]


def measured(name):
    """The declared bias, the cosine and the noise beside RLOO's of a preset, as the page has them."""
    (row,) = re.findall(rf"^\| `{name}` \| .* \| (\w+ \| -?[\d.]+ \| [^|]+ \|)$", ALL, re.MULTILINE)
    return row


def test_every_preset_has_its_row():
    assert named(ALL) == PAPERS
    for name in PAPERS:
        assert measured(name).startswith(f"{Estimator.preset(name).bias_status} |"), name


def test_the_pages_count_what_the_code_has():
    others = sum(bool(preset.beyond) for preset in PRESETS.values())
    teachers = len(PRESETS) - len(PAPERS) - others
    words = {6: "six", 8: "eight", 12: "twelve"}
    assert f"checks {len(named_estimators())} declarations" in ALL
    assert f"All {len(PAPERS)} presets of the table" in ALL
    assert f"There are {len(PRESETS)} presets: [{len(PAPERS)} that learn from rewards]" in README
    assert f"[{words[teachers]} that learn from a teacher]" in README
    assert f"[{words[others]} defaults of other toolkits]" in README
    origins = Counter(preset.origin for preset in PRESETS.values())
    counted = f"[{origins['paper']} are of papers, {origins['toolkit']} of toolkits, and "
    assert f"{counted}{words[origins['nobody']]} nobody else has]" in README
    problems = len(default_problems())
    assert (
        f"over {words[problems]} problems" in README
        and f"the {words[problems]} tiny problems" in ALL
    )


def test_the_readme_keeps_six_rows_with_the_numbers_of_the_page():
    assert len(named(README)) == 6
    for name in named(README):
        assert f"{axes(name)} {measured(name)}" in README.splitlines()


@pytest.mark.slow
def test_the_numbers_are_those_of_the_lab():
    table = runpy.run_path(str(RECIPES / "enumeration" / "estimators_table.py"))
    rloo = measure_bias("rloo")
    less = []
    for name in PAPERS:
        verdict = measure_bias(name)
        assert measured(name).endswith(f"| {table['numbers'](verdict, rloo)}"), name
        of_mean_reward = verdict.of_reward is None and not Estimator.preset(name).beta
        if verdict.declared in ("exact", "exact_up_to_scale") and of_mean_reward:
            less.append([ratio < 0.999 for ratio in table["beside_rloo"](verdict, rloo)])
    counts = [sum(problem) for problem in zip(*less, strict=True)]
    others = f"of {len(less) - 1} other exact presets"
    assert len(counts) == len(default_problems())
    assert f"{str(counts[:-1])[1:-1]} and {counts[-1]} {others}" in ALL
    assert f"{min(counts)} to {max(counts)} {others}" in CHOOSE
