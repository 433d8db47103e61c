import re
from html.parser import HTMLParser

import pytest

from tokenrl.errors import Refused
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.metrics import MetricsLog, write_completions
from tokenrl.runs.report import report_from_directory, write_report

EVIL = '<script>alert("1")</script>'


class Page(HTMLParser):
    """Collects the tags and the text, and notices a tag that is never closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(tmp_path / "my run") as run:
        run.write_config(
            {"title": f"sorting {EVIL}", "seed": 3, "solved": 0.9, "command": f"tokenrl train {EVIL}"}
        )
        with MetricsLog(run.metrics, run.timings) as log:
            log.write(0, {"eval_reward": 0.125, "eval_reward_greedy": 0.2})
            for step in (1, 2):
                log.write(step, {"reward": 0.5, "frac_reward_zero_std": 0.25 * step, "skipped_steps": 7})
        for step, text in ((1, EVIL), (2, "middle"), (10, "& last\n\x00\ud800")):
            write_completions(
                run.completions, step, [{"prompt": "p", "completion": text, "reward": 1.0}] * 20
            )
        run.write_summary({"exit_reason": "completed", "steps": 2, "wall_seconds": 61,
                           "tokens_per_second": 99.0, "eval_before": {"reward": 0.125},
                           "eval_after": {"reward": 0.8765}})  # fmt: skip
    return run


def test_report_needs_the_run_directory_alone(run):
    path = report_from_directory(run.path)
    assert path == run.report and run.plot.is_file()
    page = Page(path.read_text("utf-8"))
    for part in ("0.125 → 0.8765", "completed, 2 steps, 1:01, 99 tokens/s", "groups without signal",
                 "skipped steps", "Completions at step 1", "Completions at step 10", "& last", '"seed": 3',
                 '"python"', "To repeat"):  # fmt: skip
        assert part in page.text
    assert "middle" not in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert (
        len(images) == 1 and images[0]["src"].startswith("data:image/png;base64,iVBOR") and images[0]["alt"]
    )


def test_all_text_is_escaped(run):
    text = report_from_directory(run.path).read_text("utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text
    page = Page(text)
    assert page.text.count(EVIL) >= 4 and not [tag for tag, _ in page.tags if tag == "script"]


def test_page_asks_for_nothing_outside_and_knows_the_dark(run):
    text = report_from_directory(run.path).read_text("utf-8")
    assert not re.search(r"""(src|href)=(?!["']?data:)|@import|url\(|https?:""", text)
    assert "prefers-color-scheme: dark" in text


def test_unfinished_run_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null}\n{"step": 2, "rew')
    page = Page(report_from_directory(tmp_path).read_text("utf-8"))
    assert "unfinished" in page.text and "before" not in page.text


def test_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"metrics\.jsonl"):
        report_from_directory(tmp_path)


def test_without_a_plot_and_with_a_command_in_words(tmp_path):
    path = write_report(tmp_path / "r.html", config={"command": ["tokenrl", "train"]}, metrics=[], summary={},
                        completions={}, plot_path=None, title="t")  # fmt: skip
    page = Page(path.read_text())
    assert "tokenrl train" in page.text and "img" not in [tag for tag, _ in page.tags]
