"""The page of several runs: their numbers side by side, the settings that differ, and a curve of each run."""

import re

import pytest
from command_line import completes
from made_runs import write_run
from refusals import refused
from runs.pages import EVIL, Page

from tokenrl.lab import compare_runs

pytestmark = pytest.mark.drawn
LONG = EVIL + 100 * "x"


def make_run(folder, end, **settings):
    after = {"reward": end, "reward_stderr": 0.01, f"pass@{end}": 1.0}
    config = {"title": EVIL, "output_dir": folder.name, "versions": {"torch": end}, **settings}
    ended = {"exit_reason": "finished", "steps": 10, "eval_after": after}
    write_run(folder, [0.1, end], summary=ended, config=config, reward=end)


def rows_of(text, heading):
    part = text[text.index(f"<h2>{heading}") :]
    rows = re.findall("<tr.*?</tr>", part[: part.index("</table>")], flags=re.DOTALL)
    return [[Page(cell).text for cell in re.findall("<t[hd]>.*?</t[hd]>", row)] for row in rows]


def test_runs_stand_side_by_side_with_the_settings_that_differ(workplace, capsys):
    made_of = {"hashes": {"data": "1", "reward": "right 2"}, "logging_steps": 1}
    make_run(
        workplace / "one", 0.5, task="a", seed=0, estimator={"scale": "none", "gamma": 1}, **made_of
    )
    made_of = {"hashes": {"data": "1", "reward": "right 3"}, "logging_steps": 5}
    make_run(
        workplace / "two", 0.75, task=LONG, seed=0, estimator={"gamma": 1}, lora_r=8, **made_of
    )
    completes("report one two")
    assert capsys.readouterr().out == "comparison.html\n"
    text = (workplace / "comparison.html").read_text("utf-8")
    numbers = rows_of(text, "Final numbers")
    assert ["reward", "0.500 ± 0.010", "0.750 ± 0.010"] in numbers
    assert ["pass@0.5", "1", "-"] in numbers and numbers[0] == ["", "one", "two"]
    assert rows_of(text, "Settings that differ")[1:] == [
        ["estimator.scale", "none", "-"],
        ["task", "a", LONG],
        ["hash of reward", "right 2", "right 3"],
        ["lora_r", "-", "8"],
    ]
    page = Page(text)
    words = " ".join(page.text.split())
    assert "says nothing yet about their settings" in words
    caption = "mean reward of the sampled completions or episodes one 0.5 two 0.75"
    assert f"reward {caption}" in words and f"eval_reward {caption}" in words
    # Three rewards in two sizes; entropy and the share of clipped updates, which are not 0.
    assert len(page.all("svg")) == 3 * 2 + 2
    assert text.count("<script") == 1


@pytest.mark.parametrize(
    ("runs", "output", "words"),
    [
        (["one", "two"], "two", "two cannot be written .* Give the name of a file"),
        (["one", "two"], "no/such/c.html", "Give the name of a file in a directory that exists"),
        (["one", "three"], "c.html", "three holds no metrics.jsonl"),
    ],
)
def test_what_cannot_be_shown_is_refused(workplace, runs, output, words):
    for name in ("one", "two"):
        make_run(workplace / name, 0.5)
    with refused(words):
        compare_runs(runs, output)
