import json
import re

import pytest

from runs.pages import EVIL, Page
from tokenrl.errors import Refused
from tokenrl.runs.comparison import compare_runs


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made(name, kind=..., after=..., **settings)`: a run in the current directory."""
    monkeypatch.chdir(tmp_path)

    def make(name, kind="train", after=None, **settings):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"step": 1, "reward": 0.5, "loss": 2.0}, {"step": 1, "eval_reward": 0.5}]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        config = {"kind": kind, "title": name, "command": name, "output_dir": name, **settings}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "summary.json").write_text(
            json.dumps({"exit_reason": "finished", "eval_after": after, "loss_after": 2.0})
        )
        (folder / "report.html").write_text("")
        return name

    return make


def rows(page, heading):
    """The rows of the table below a heading."""
    part = page[page.index(f"<h2>{heading}") :]
    table = part[: part.index("</table>")]
    return [
        [Page(cell).text for cell in re.findall("<t[hd].*?</t[hd]>", row)]
        for row in re.findall("<tr.*?</tr>", table)
    ]


def test_numbers_stand_side_by_side_and_only_settings_that_differ_are_shown(made, tmp_path):
    estimator = {"baseline": "rloo", "scale": "none"}
    one = made("one", after={"reward": 0.5, "reward_stderr": 0.01}, task="a", seed=0, estimator=estimator)
    two = made("two", after={"reward": 0.7, "pass@4": 1.0}, task="a", seed=1, lora_r=8,
               estimator=estimator | {"scale": "group_std"})  # fmt: skip
    page = compare_runs([one, two], tmp_path / "page.html").read_text("utf-8")
    assert rows(page, "Final numbers") == [
        ["", "one", "two"],
        ["reward", "0.500 ± 0.010", "0.7"],
        ["loss of the last batch", "2", "2"],
        ["pass@4", "-", "1"],
    ]
    assert rows(page, "Settings that differ") == [
        ["", "one", "two"],
        ["estimator.scale", "none", "group_std"],
        ["lora_r", "-", "8"],
        ["seed", "0", "1"],
    ]
    text = Page(page).text
    assert "says nothing yet about their settings" in text and "with several seeds" in text
    assert "do not measure the same" not in text


def test_links_lead_from_the_page_to_the_reports(made, tmp_path):
    (tmp_path / "pages").mkdir()
    one, two = made("one run"), made("two")
    (tmp_path / "two" / "report.html").unlink()
    page = Page(compare_runs([one, two], "pages/p.html").read_text("utf-8"))
    assert [found["href"] for found in page.all("a")] == ["../one%20run/report.html"]
    assert "None: the runs have the same settings." in page.text


def test_other_tasks_are_named_as_such_and_texts_are_escaped(made):
    page = compare_runs([made("one", task=EVIL), made("two", task="b", title=EVIL)]).read_text("utf-8")
    assert "differ in task, so their numbers do not measure the same" in page
    assert page.count("<script") == 1 and EVIL in Page(page).text


def test_loss_and_reward_of_supervised_runs(made):
    page = Page(compare_runs([made("one", "sft"), made("two", "sft")]).read_text("utf-8"))
    assert "loss: training" in page.text and "reward: held-out sampled" in page.text


@pytest.mark.parametrize(
    ("runs", "output", "words"),
    [
        (["one", "world"], "c.html", "one (tokenrl train) and world (tokenrl control)"),
        (["one", "one/"], "c.html", "given twice"),
        (["one", "nothing"], "c.html", "nothing holds no metrics.jsonl"),
        (["one", "two"], "two", "give a file"),
        (["one", "two"], "no/such/c.html", "give a file"),
    ],
)
def test_what_cannot_be_compared_is_refused(made, tmp_path, runs, output, words):
    made("one"), made("two"), made("world", "control")
    with pytest.raises(Refused, match=re.escape(words)):
        compare_runs(runs, output)
    assert not (tmp_path / "c.html").exists()
