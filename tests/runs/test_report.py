import json
import math
import re

import pytest

from runs.pages import EVIL, Page
from tokenrl.errors import Refused
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.metrics import MetricsLog, write_completions
from tokenrl.runs.page import table, tag
from tokenrl.runs.report import report_from_directory

CHAT = [{"role": "system", "content": "be_brief"}, {"role": "user", "content": [{"type": EVIL}]}]


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
            row = {
                "prompt": CHAT,
                "completion": text,
                "reward": step / 8,
                "rewards/a_b": math.nan,
                "cut": True,
            }
            write_completions(run.completions, step, [row] * 20)
        after = {"reward": 0.87654, "reward_stderr": 0.0123, "pass@4": 0.5, "reward_greedy": 1, EVIL: 2}
        run.write_summary({"exit_reason": "completed", "steps": 2, "wall_seconds": 61, "verdict": EVIL,
                           "tokens_per_second": 99.0, "eval_before": {"reward": 0.125},
                           "eval_after": after})  # fmt: skip
    return run


def test_report_needs_the_run_directory_alone(run):
    path = report_from_directory(run.path)
    assert path == run.report and run.plot.is_file()
    page = Page(path.read_text("utf-8"))
    for part in ("completed, 2 steps, 1:01, 99 tokens/s", "groups without signal", "skipped steps",
                 "solved: 0.9", "& last", '"seed": 3', '"python"', "To repeat",
                 "held-out sampled 0.125"):  # fmt: skip
        assert part in page.text
    assert page.text.count("middle") == 16 and page.all("svg")


def test_a_standard_error_stands_beside_its_number_and_names_keep_their_underscores(run):
    page = Page(report_from_directory(run.path).read_text("utf-8"))
    assert "reward0.125 → 0.877 ± 0.012reward_greedy- → 1" in page.text
    assert "stderr" not in page.text and len(page.all("div", "card")) == 4


def test_how_often_the_gradient_was_clipped_stands_beside_its_norm(tmp_path):
    rows = [{"step": step, "grad_norm": 2.0, "grad_clipped": float(step > 1)} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(report_from_directory(tmp_path).read_text("utf-8"))
    assert "before clipping, which 75% of the updates needed" in page.text


def test_all_text_is_escaped(run):
    text = report_from_directory(run.path).read_text("utf-8")
    assert text.count("<script") == 1 == text.count("</script") and "&lt;script&gt;" in text
    page = Page(text)
    # title and heading, verdict, card, 16 completions of a step, 48 prompts, command
    assert page.text.replace('\\"', '"').count(EVIL) >= 2 + 1 + 1 + 16 + 48 + 1
    assert "alert" not in text[text.index("<script") : text.index("</script")]
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    assert tag("p", EVIL, title='"> <b>') == (
        '<p title="&quot;&gt; &lt;b&gt;">&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt;</p>'
    )


def test_page_asks_for_nothing_outside(run):
    text = report_from_directory(run.path).read_text("utf-8")
    assert not re.search(r"""(src|href)=|@import|url\(|https?:|//[a-z]""", text.replace("</", ""))


def test_colours_follow_the_dark_mode(run):
    text = report_from_directory(run.path).read_text("utf-8")
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    first = dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]+)", light))
    second = dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]+)", dark))
    assert first.keys() == second.keys() >= {"--ink", "--page", *(f"--c{place}" for place in range(7))}
    for colours in (first, second):  # legible: WCAG asks for 4.5 with text
        for name in ("--ink", "--soft", *(f"--c{place}" for place in range(1, 7))):
            assert contrast(colours[name], colours["--page"]) >= 4.5, name
            assert name != "--soft" or contrast(colours[name], colours["--card"]) >= 4.5
    drawn = text[text.index("<svg") : text.rindex("</svg>")]
    assert "var(--c1)" in drawn and not re.search(r"#[0-9a-f]{3}|rgb|black|white", drawn)


def contrast(one, other):
    """The contrast ratio of two colours, by WCAG 2."""

    def luminance(colour):
        colour = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_completions_bear_the_numbers_by_which_they_are_sorted_and_filtered(run):
    page = Page(report_from_directory(run.path).read_text("utf-8"))
    numbers = [json.loads(found["data-numbers"]) for found in page.all("article", "sample")]
    assert [n["step"] for n in numbers] == [1] * 16 + [2] * 16 + [10] * 16
    assert numbers[0] == {"step": 1, "reward": 0.125, "rewards/a_b": None, "cut": 1, "characters": len(EVIL)}
    assert numbers[16]["characters"] == len("middle")
    (form,) = page.all("form")
    assert "hidden" in form  # useless without the script, which shows it
    assert {found["name"] for found in page.all("select")} == {"by", "order", "column"}
    assert {found["name"] for found in page.all("input")} == {"search", "least", "most"}


def test_of_many_steps_some_are_shown_with_the_first_and_the_last(run):
    for step in range(11, 111):
        write_completions(run.completions, step, [{"prompt": "p", "completion": "c"}])
    page = Page(report_from_directory(run.path).read_text("utf-8"))
    steps = sorted({json.loads(found["data-numbers"])["step"] for found in page.all("article")})
    assert steps[0] == 1 and steps[-1] == 110 and len(steps) == 8


def test_a_chat_is_shown_as_messages_with_roles(run):
    page = Page(report_from_directory(run.path).read_text("utf-8"))
    assert len(page.all("div", "message")) == 2 * 48
    assert "promptsystembe_briefuser[{" in page.text and '"role"' not in page.text
    write_completions(run.completions, 11, [{"prompt": '[{"role": 1}]', "completion": "[{not JSON"}])
    page = Page(report_from_directory(run.path).read_text("utf-8"))
    assert (
        '[{"role": 1}]' in page.text and "[{not JSON" in page.text and len(page.all("div", "message")) == 96
    )


def test_each_cell_of_a_table_names_its_column():
    page = Page(table(("name", "first", "last"), [["entropy", "1", "2"]]))
    labels = [found.get("data-label") for name, found in page.tags if name in ("th", "td")]
    assert labels == [None, None, None, "name", "first", "last"]
    assert table(("", "first"), []) == ""


def test_unfinished_run_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null}\n{"step": 2, "rew')
    page = Page(report_from_directory(tmp_path).read_text("utf-8"))
    assert "unfinished" in page.text and "before" not in page.text and not page.all("svg")


def test_no_run_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"metrics\.jsonl"):
        report_from_directory(tmp_path)


def test_a_command_in_words_or_from_python(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    for command, shown in ((["tokenrl", "train"], "tokenrl train"), (None, "Started from Python")):
        (tmp_path / "config.json").write_text(json.dumps({"command": command}))
        assert shown in Page(report_from_directory(tmp_path).read_text()).text


@pytest.mark.parametrize(
    "name, text",
    [
        ("summary.json", '{"exit_reason": "fin'),
        ("summary.json", "[1]"),
        ("metrics.jsonl", '{"reward": 1.0}\n'),
        ("metrics.jsonl", '{"step": null, "reward": 1.0}\n'),
        ("completions/step_000001.parquet", "PAR1"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(run, name, text):
    (run.path / name).write_text(text)
    with pytest.raises(Refused, match=rf"(?s){re.escape(name)}.*[Rr]emove"):
        report_from_directory(run.path)


def test_a_file_of_somebody_else_among_the_completions_is_left_out(run):
    (run.completions / "step_final.parquet").write_text("mine")
    assert "& last" in Page(report_from_directory(run.path).read_text("utf-8")).text
