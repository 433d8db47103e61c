import json
import math
import re
from contextlib import closing

import pytest

from runs.pages import EVIL, Page
from tokenrl.errors import Refused
from tokenrl.runs.directory import RunDirectory
from tokenrl.runs.files import write_json
from tokenrl.runs.html import Section, completions, table, write_page
from tokenrl.runs.metrics import MetricsLog, write_completions
from tokenrl.runs.report import compare_runs, report_from_directory

CHAT = [{"role": "system", "content": "be_brief"}, {"role": "user", "content": [{"type": EVIL}]}]


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "my run") as run:
        run.write_config(
            {"title": f"sorting {EVIL}", "seed": 3, "solved": 0.9, "command": f"tokenrl train {EVIL}"}
        )
        with closing(MetricsLog(run.path)) as log:
            log.write(0, {"eval_reward": 0.125, "eval_reward_greedy": 0.2, "eval_reward_stderr": 0.01})
            for step in (1, 2, 3, 4):
                log.write(step, {"reward": 0.5, "grad_norm": 2.0, "grad_clipped": float(step > 1)})
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
        write_json(run.summary, {"exit_reason": "completed", "steps": 2, "wall_seconds": 61, "verdict": EVIL,
                           "tokens_per_second": 99.0, "eval_before": {"reward": 0.125},
                           "eval_after": after})  # fmt: skip
    return run


def page_of(run):
    return Page(report_from_directory(getattr(run, "path", run)).read_text("utf-8"))


@pytest.mark.drawn
def test_the_page_needs_the_run_directory_alone_and_tells_its_numbers(run):
    page = page_of(run)
    for part in ("completed, 2 steps, 1:01, 99 tokens/s", "reward0.125 → 0.877 ± 0.012", "pass@4- → 0.5",
                 "held-out sampled 0.125 ± 0.010", "solved: 0.9", '"seed": 3', '"python"', "To repeat",
                 "before clipping, which 75% of the updates needed"):  # fmt: skip
        assert part in page.text
    assert (run.path / "learning_curve.png").read_bytes().startswith(b"\x89PNG") and len(
        page.all("svg")
    ) == 3  # two sizes, and the norm


@pytest.mark.drawn
def test_all_text_is_escaped_and_nothing_is_asked_for_outside(run):
    text = report_from_directory(run.path).read_text("utf-8")
    page = Page(text)
    assert text.count("<script") == 1 == text.count("</script") and "&lt;script&gt;" in text
    assert (
        page.text.replace('\\"', '"').count(EVIL) >= 2 + 1 + 1 + 16 + 48 + 1
    )  # headings, card, texts, command
    assert "alert" not in text[text.index("<script") : text.index("</script")]
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    inside = re.sub(r'xlink:href="#', "", text.replace("</", ""))
    assert not re.search(r"""(src|href)=|@import|url\((?!#)|https?:|//[a-z]""", inside)
    hostile = write_page(
        run.path / "x.html", EVIL, [Section(EVIL, [table([EVIL, '"> <b>'], [[EVIL, '"> <b>']])])]
    )
    assert hostile.read_text().count("<script") == 1 and "<b>" not in hostile.read_text()


def test_colours_follow_the_dark_mode_and_can_be_read(run):
    from tokenrl.runs.plots import PALETTE

    light, dark = (
        report_from_directory(run.path).read_text("utf-8").split("@media (prefers-color-scheme: dark)")
    )
    first = dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]+)", light))
    second = dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]+)", dark))
    assert first.keys() == second.keys() == {"--page", "--card", *(f"--{name}" for name in PALETTE)}
    assert {name: first[f"--{name}"] for name in PALETTE} == PALETTE
    for colours in (first, second):  # WCAG asks for 4.5 with text
        for name in ("--ink", "--soft", *(f"--c{place}" for place in range(1, 7))):
            assert contrast(colours[name], colours["--page"]) >= 4.5, name


def contrast(one, other):
    """The contrast ratio of two colours, by WCAG 2."""

    def luminance(colour):
        colour = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_completions_are_folded_and_bear_the_numbers_by_which_they_are_sorted(run):
    text = report_from_directory(run.path).read_text("utf-8")
    before, _, _ = text.partition("All 48 completions")
    assert before.count("<article") == 4 and before.count("last") >= 4 and "middle" not in before
    page = Page(text)
    numbers = [json.loads(found["data-numbers"]) for found in page.all("article", "sample")][4:]
    assert [n["step"] for n in numbers] == [1] * 16 + [2] * 16 + [10] * 16
    assert numbers[0] == {"step": 1, "reward": 0.125, "rewards/a_b": None, "cut": 1, "characters": len(EVIL)}
    (form,) = page.all("form")
    assert "hidden" in form  # useless without the script, which shows it
    assert {found["name"] for found in page.all("select")} == {"by", "order", "column"}
    assert {found["name"] for found in page.all("input")} == {"search", "least", "most"}


def test_of_many_steps_some_are_shown_with_the_first_and_the_last(run):
    for step in range(11, 111):
        write_completions(run.completions, step, [{"prompt": "p", "completion": "c"}])
    (run.completions / "step_final.parquet").write_text("a file of somebody else")
    steps = sorted({json.loads(found["data-numbers"])["step"] for found in page_of(run).all("article")})
    assert steps[0] == 1 and steps[-1] == 110 and len(steps) == 8


def test_a_chat_is_shown_as_messages_with_roles_and_other_texts_as_they_are(tmp_path):
    rows = [
        {"prompt": json.dumps(CHAT), "completion": "a\x1b"},
        {"prompt": '[{"role": 1}]', "completion": "[{no"},
    ]
    page = Page(write_page(tmp_path / "p.html", "t", [Section("s", [completions(rows)])]).read_text())
    assert len(page.all("div", "message")) == 2 * 2  # those that are open, and all
    assert "system" in page.text and "be_brief" in page.text and "a\\x1b" in page.text
    assert '[{"role": 1}]' in page.text and "[{no" in page.text


@pytest.mark.parametrize("names, shown", [(["one"], 0), (["one", "two"], 2)])
def test_the_mean_of_a_single_reward_is_not_told_twice(tmp_path, names, shown):
    after = {"reward": 0.5, **{f"rewards/{name}/mean": 0.5 for name in names}}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    (tmp_path / "summary.json").write_text(json.dumps({"eval_after": after}))
    row = {"prompt": "p", "completion": "c", "reward": 0.5, **{f"rewards/{name}": 0.5 for name in names}}
    write_completions(tmp_path / "completions", 1, [row])
    page = page_of(tmp_path)
    assert page.text.count("/mean") == shown and len(page.all("div", "card")) == 1 + shown
    assert all(len(json.loads(a["data-numbers"])) == 3 + shown for a in page.all("article"))


def test_each_cell_of_a_table_names_its_column_for_narrow_screens(tmp_path):
    shown = [table(("name", "first", "last"), [["entropy", "1", "2"]]), table(("", "first"), [])]
    page = Page(
        write_page(tmp_path / "p.html", "t", [Section("s", shown), Section("empty", [{}])]).read_text()
    )
    labels = [found.get("data-label") for name, found in page.tags if name in ("th", "td")]
    assert labels == [None, None, None, "name", "first", "last"] and len(page.all("table")) == 1
    assert "empty" not in page.text


def test_unfinished_run_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null}\n{"step": 2, "rew')
    page = page_of(tmp_path)
    assert "unfinished" in page.text and "before" not in page.text and not page.all("svg")


def test_what_is_no_run_is_refused_and_a_comparison_answers_with_its_page(tmp_path):
    with pytest.raises(Refused, match=r"metrics\.jsonl"):
        report_from_directory(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(Refused, match="holds a comparison, not a run"):
        report_from_directory(tmp_path)
    (tmp_path / "report.html").write_text("the page")
    assert report_from_directory(tmp_path).read_text() == "the page"


def test_a_command_in_words_or_from_python(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    for command, shown in ((["tokenrl", "train"], "tokenrl train"), (None, "Started from Python")):
        (tmp_path / "config.json").write_text(json.dumps({"command": command}))
        assert shown in page_of(tmp_path).text


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
        summary = {"exit_reason": "finished", "eval_after": after, "loss_after": 2.0}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "report.html").write_text("")
        return name

    return make


def rows_of(page, heading):
    """The rows of the table below a heading."""
    part = page[page.index(f"<h2>{heading}") :]
    rows = re.findall("<tr.*?</tr>", part[: part.index("</table>")])
    return [[Page(cell).text for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows]


def test_numbers_stand_side_by_side_and_only_settings_that_differ_are_shown(made, tmp_path):
    rloo = {"baseline": "rloo", "scale": "none"}
    one = made("one run", after={"reward": 0.5, "reward_stderr": 0.01}, task="a", seed=0, estimator=rloo)
    two = made("two", after={"reward": 0.7, "pass@4": 1.0}, task="a", seed=1, lora_r=8,
               estimator=rloo | {"scale": "group_std"})  # fmt: skip
    (tmp_path / "pages").mkdir()
    (tmp_path / "two" / "report.html").unlink()
    page = compare_runs([one, two], "pages/p.html").read_text("utf-8")
    header = ["", "one run", "two"]
    assert rows_of(page, "Final numbers") == [
        header, ["reward", "0.500 ± 0.010", "0.7"], ["loss of the last batch", "2", "2"], ["pass@4", "-", "1"]
    ]  # fmt: skip
    assert rows_of(page, "Settings that differ") == [
        header, ["estimator.scale", "none", "group_std"], ["lora_r", "-", "8"], ["seed", "0", "1"]
    ]  # fmt: skip
    text = Page(page).text
    assert "says nothing yet about their settings" in text and "do not measure the same" not in text
    assert text.count("two 0.5") == 2  # in the legends of training and held-out rewards
    assert [found["href"] for found in Page(page).all("a")] == ["../one%20run/report.html"]


def test_other_tasks_are_named_as_such_and_texts_are_escaped(made):
    page = compare_runs([made("one", task=EVIL), made("two", task="b", title=EVIL)]).read_text("utf-8")
    assert "differ in task, so their numbers do not measure the same" in page
    assert page.count("<script") == 1 and EVIL in Page(page).text


def test_loss_and_reward_of_supervised_runs(made):
    page = Page(compare_runs([made("one", "sft"), made("two", "sft")]).read_text("utf-8"))
    assert "loss: training" in page.text and "reward: held-out sampled" in page.text
    assert "None: the runs have the same settings." in page.text


@pytest.mark.parametrize(
    ("runs", "output", "words"),
    [
        (["one", "world"], "c.html", "one (tokenrl train) and world (tokenrl control)"),
        (["one", "one/"], "c.html", "given twice"),
        (["one", "nothing"], "c.html", "nothing holds no metrics.jsonl"),
        (["one", "two"], "two", "it is a directory"),
        (["one", "two"], "no/such/c.html", "its directory does not exist"),
    ],
)
def test_what_cannot_be_compared_is_refused(made, tmp_path, runs, output, words):
    made("one"), made("two"), made("world", "control")
    with pytest.raises(Refused, match=re.escape(words)):
        compare_runs(runs, output)
    assert not (tmp_path / "c.html").exists()
