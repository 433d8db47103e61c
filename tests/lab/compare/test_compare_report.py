"""The report of a comparison: the verdict first and in words, all that is known, at any width, no network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape

import pytest
from made_up import comparison, plan, problem

from tokenrl.errors import Stopped
from tokenrl.lab.compare.noise import GradientNoise
from tokenrl.lab.compare.report.page import write_report
from tokenrl.lab.compare.statistics.found import Interval
from tokenrl.lab.compare.statistics.words import headline

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
LONG = "grpo,scale=none,aggregation=sequence_mean,learning_rate=0.0001"


def written(found):
    return write_report(found, found.output_dir / "report.html").read_text()


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def verdict_card(page):
    return page.split('<div class="card verdict">')[1].split("</div>")[0]


@pytest.mark.parametrize(
    ("ends", "said", "not_said"),
    [
        ({"rloo": 0.99, "grpo": 0.8}, ["Better than reinforce: rloo.", "Worse than reinforce: grpo."], []),
        ({}, ["Equivalent to reinforce within 0.02: rloo and grpo."], ["etter", "orse"]),
    ],
)
def test_the_verdict_comes_first_and_says_what_was_found(tmp_path, ends, said, not_said):
    page = written(comparison(tmp_path, plan(), ends, spread=0.002))
    assert headings(page)[0] == "Verdict"
    assert all(words in verdict_card(page) for words in said)
    assert not any(words in verdict_card(page) for words in not_said)
    assert "they were not compared with each other" in verdict_card(page)


def test_what_is_not_decided_is_not_said_to_be(tmp_path):
    undecided = comparison(tmp_path / "spread", plan(), {"rloo": 0.93}, spread=0.1)
    assert verdict_card(written(undecided)).startswith("<b>Undecided against reinforce: rloo and grpo.</b>")
    few = comparison(tmp_path / "few", plan(seeds=3), {"rloo": 0.99}, spread=0.001)
    card = verdict_card(written(few))
    assert card.startswith("<b>No verdict, because there are too few seeds: rloo and grpo against reinforce.")
    assert "better" not in card and "worse" not in card


def test_failed_runs_and_arms_that_are_not_valid_are_shown(tmp_path):
    broken = {"runs/sort_digits/rloo/seed_2": {"state": "failed", "reason": "The disk was full."}}
    found = comparison(tmp_path, plan(), **broken)
    page = written(found)
    assert found.exit_code == 1
    assert headline(found.judgement.families[0]).endswith("Not valid, so not compared with reinforce: rloo.")
    assert "18 runs over 6 seeds, 1 of them failed" in page
    assert "Seed 2: The disk was full." in page
    assert '<td data-label="state">failed</td>' in page


def test_without_any_score_the_reason_is_told(tmp_path):
    paths = [f"runs/sort_digits/{arm}/seed_{seed}" for arm in ("rloo", "grpo") for seed in range(6)]
    nothing = {
        "state": "missing",
        "reason": "No key.",
        "scores": {},
        "samples": (),
        "curves": {},
        "seconds": (),
    }
    with pytest.raises(Stopped, match=r"no arm has the score area .* No key\. Mend"):
        comparison(tmp_path, plan(), **dict.fromkeys(paths, nothing))
    found = comparison(tmp_path, plan(), **dict.fromkeys(paths[:6], nothing))
    assert "rloo" in written(found) and "Without a score: no run of rloo" in verdict_card(written(found))


def test_only_what_there_is_has_a_section(tmp_path):
    found = comparison(tmp_path, plan())
    few = headings(written(found))
    assert "Learning rates" not in few and "All problems together" not in few
    assert not any(heading.startswith("Noise") for heading in few)
    number = Interval(1.5, 1.2, 1.8)
    tuned = replace(
        found,
        sensitivity={("sort_digits", "rloo"): {1e-4: (0.8, 0.9), 2e-4: (0.7,), 4e-4: (float("-inf"),)}},
        noise=(GradientNoise("sort_digits", "half way", "rloo", number, number),),
    )
    page = written(tuned)
    assert {"Learning rates", "Noise of the gradient, against learning"} <= set(headings(page))
    assert "1.5 [1.2, 1.8]" in page and "0.8, 0.9" in page and ">failed<" in page


def test_labels_are_escaped_and_the_page_needs_no_network(tmp_path):
    label = "rloo,<script>alert(1)</script>"
    planned = plan()
    arms = (planned.arms[0], replace(planned.arms[1], label=label))
    page = written(comparison(tmp_path, replace(planned, arms=arms)))
    assert label not in page and "&lt;script&gt;alert" in page
    assert not re.findall(r'(?:src|href)="', page) and "url(" not in page and "@import" not in page


PROBE = """<script>addEventListener("load", () => {
  const page = document.querySelector("iframe").contentDocument;
  for (const d of page.querySelectorAll("details")) d.open = true;
  const boxes = [...page.querySelectorAll(".plot .x, .bar.axis .x")].map((e) =>
    [e.parentElement, e.getBoundingClientRect()]);
  let over = 0;
  boxes.forEach(([p, a], i) => boxes.slice(i + 1).forEach(([q, b]) => {
    if (p === q && a.width && a.left < b.right && b.left < a.right) over += 1; }));
  const narrow = [...page.querySelectorAll("svg")].filter((s) => s.getBoundingClientRect().width < 100);
  const scroll = page.documentElement.scrollWidth;
  document.body.innerHTML = `<p id=found>${JSON.stringify({scroll, over, narrow: narrow.length})}</p>`;
});</script>"""


def in_browser(page, folder, width):
    """What Chromium makes of a page in a frame of some width, and its messages on the console."""
    file = folder / "probe.html"
    frame = f'<iframe width="{width}" height="900" style="border:0" srcdoc="{escape(page)}"></iframe>'
    file.write_text(f"<!doctype html><body>{frame}{PROBE}</body>")
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder}/profile", "--dump-dom", f"file://{file}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(re.search(r'<p id="found">(.*?)</p>', done.stdout)[1])
    return found, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("large", [False, True])
def test_in_a_browser_nothing_overflows_or_overlaps(tmp_path, width, large):
    arms = ("reinforce", "rloo")
    problems = [problem()]
    if large:
        arms = (*arms, "grpo", LONG, "rloo,num_generations=4", "dr_grpo", "reinforce_running_mean", "remax")
        problems = [problem(f"task_{i}") for i in range(4)]
    planned = plan(arms, problems, itself_seeds=tuple(range(100, 106)))
    page = written(comparison(tmp_path, planned, {"rloo": 0.99}))
    found, messages = in_browser(page, tmp_path, width)
    assert messages == []
    assert found["scroll"] <= width
    assert found["over"] == 0
    assert found["narrow"] == 0
