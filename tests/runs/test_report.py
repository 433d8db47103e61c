"""Pages of runs: what they tell, that nothing in them is run or asked for outside, and what is refused."""

import hashlib
import json
import math
import re
from base64 import b64encode
from contextlib import closing
from importlib.resources import files

import pytest

from runs.pages import EVIL, Page
from tokenrl.errors import Refused
from tokenrl.runs.files import write_json
from tokenrl.runs.markup import Section, completions, table, write_page
from tokenrl.runs.metrics import MetricsLog, write_completions
from tokenrl.runs.origin import versions
from tokenrl.runs.plots import PALETTE
from tokenrl.runs.report import report_from_directory

CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]")
CHAT = [{"role": "system", "content": "be_brief"}, {"role": "user", "content": [{"type": EVIL}]}]


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    about = {"title": f"sorting {EVIL}", "command": f"tokenrl train {EVIL}", "versions": versions()}
    write_json(
        run / "config.json", {**about, "seed": 3, "solved": 0.9, "chat": True, "generator": "vllm"}
    )
    with closing(MetricsLog(run)) as log:
        log.write(0, {"eval_reward": 0.125, "eval_reward_greedy": 0.2, "eval_reward_stderr": 0.01})
        for step in (1, 2, 3, 4):
            off = {"sampling/logp_difference/max": 1e-5 / step}
            log.write(
                step, {"reward": 0.5, "grad_norm": 2.0, "grad_clipped": float(step > 1), **off}
            )
    for step, text in ((1, EVIL), (2, "middle"), (10, "& last\n\x00\ud800")):
        row = {"prompt": CHAT, "completion": text, "reward": step / 8, "rewards/a_b": math.nan}
        write_completions(run / "completions", step, [row | {"cut": True}] * 20)
    after = {"reward": 0.87654, "reward_stderr": 0.0123, "pass@4": 0.5, "reward_greedy": 1, EVIL: 2}
    ended = {"exit_reason": "completed", "steps": 4, "wall_seconds": 61, "tokens_per_second": 99.0}
    both = {"eval_before": {"reward": 0.125}, "eval_after": after}
    write_json(run / "summary.json", {**ended, **both, "verdict": EVIL})
    return run


def page_of(run):
    return Page(report_from_directory(run).read_text("utf-8"))


def page_with(path, *blocks):
    return Page(
        write_page(
            path / "p.html", EVIL, [Section(EVIL, blocks), Section("none", [{}])]
        ).read_text()
    )


@pytest.mark.drawn
def test_the_page_needs_the_run_directory_alone_and_tells_its_numbers(run):
    page = page_of(run)
    for part in ("completed, 4 steps, 1:01, 99 tokens/s", "reward0.125 ± 0.010 → 0.877 ± 0.012", "pass@4- → 0.5",
                 "held-out sampled 0.125 ± 0.010", "solved: 0.9", '"seed": 3', '"python"', "To repeat",
                 "gradient before clipping last 2", "max_grad_norm scaled down; 1 means all last 1", '"chat": true',
                 "a middle and the last step"):  # fmt: skip
        assert part in " ".join(page.text.split())
    assert len(page.all("svg")) == 4  # two sizes, the norm, and whether it was clipped


@pytest.mark.drawn
def test_all_text_is_escaped_and_the_policy_lets_one_script_run_and_nothing_load(run):
    text = report_from_directory(run).read_text("utf-8")
    page = Page(text)
    assert text.count("<script") == 1 == text.count("</script") and "&lt;script&gt;" in text
    count = page.text.replace('\\"', '"').count(EVIL)
    assert count >= 2 + 1 + 1 + 10 + 30 + 1  # headings, card, texts, command
    assert not [name for _, names in page.tags for name in names if name.startswith("on")]
    inside = re.sub(r'xlink:href="#', "", text.replace("</", ""))
    assert not re.search(r"""(src|href)=|@import|url\((?!#)|https?:|//[a-z]""", inside)
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert "alert" not in script


@pytest.mark.drawn
def test_no_control_character_of_a_run_stands_in_its_page(run, recwarn):
    odd = "a\x00\x07\x1b[31m\x7f\x9b2J\u202e"
    config = json.loads((run / "config.json").read_text())
    write_json(run / "config.json", config | {"title": odd, "command": odd, "versions": {odd: odd}})
    write_json(run / "summary.json", {"verdict": odd, "eval_after": {odd: 1.0}})
    write_completions(run / "completions", 11, [{"prompt": odd, odd: step} for step in (1, 2)])
    text = report_from_directory(run).read_text("utf-8")
    assert not CONTROL.search(text) and r"a\x00\x07\x1b[31m\x7f\x9b2J\u202e" in text
    assert r"a\x00\x07\x1b[31m\x7f\x9b2J\u202e" in samples_of(text)[-1]  # as the list shows it
    assert not recwarn.list  # of glyphs


def test_the_light_colours_are_those_of_the_palette_and_each_has_a_dark_one():
    text = files("tokenrl.runs").joinpath("page.css").read_text()
    light, dark = (
        dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]+)", part))
        for part in text.split("@media (prefers-color-scheme: dark)")
    )
    assert light.keys() == dark.keys() == {"--page", "--card", *(f"--{name}" for name in PALETTE)}
    assert {name: light[f"--{name}"] for name in PALETTE} == PALETTE


def samples_of(text):
    """The numbers of the completions of a page: of those that stand open, then of all."""
    return [json.loads(sample["data-numbers"]) for sample in Page(text).all("article", "sample")]


def test_completions_are_folded_and_bear_the_numbers_by_which_they_are_sorted(run):
    (run / "completions" / "step_final.parquet").write_text("a file of somebody else")
    text = report_from_directory(run).read_text("utf-8")
    opened, _, _ = text.partition("All 30 completions")
    assert opened.count("<article") == 3 == opened.count('class="few"')  # a prompt of each step
    numbers = samples_of(text)
    assert [n["step"] for n in numbers] == [1, 2, 10, *[1] * 10, *[2] * 10, *[10] * 10]
    first = {"step": 1, "reward": 0.125, "rewards/a_b": None, "cut": 1, "characters": len(EVIL)}
    assert numbers[0] == numbers[3] == first
    (form,) = Page(text).all("form")
    assert "hidden" in form  # useless without the script, which shows it


def test_a_chat_is_shown_as_messages_with_roles_and_other_texts_as_they_are(tmp_path):
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [
        {"role": "assistant", "content": "sum", "tool_calls": calls},
        {"role": "tool", "content": "<3>"},
    ]
    rows = [
        {"prompt": json.dumps(CHAT), "completion": "a\x1b"},
        {"prompt": '[{"role": 1}]', "completion": "[{no"},
        {"prompt": "1", "completion": json.dumps(turns)},
    ]
    page = page_with(tmp_path, completions(rows))
    assert len(page.all("div", "message")) == 2 * 4  # those that are open, and all
    assert len(page.all("div", "tool")) == 2
    texts = ("system", "be_brief", "a\\x1b", '[{"role": 1}]', "[{no", json.dumps(calls[0]), "<3>")
    assert all(text in page.text for text in texts)


@pytest.mark.parametrize(("names", "count"), [(["one"], 0), (["one", "two"], 2)])
def test_several_rewards_have_a_curve_each_and_the_mean_of_a_single_one_is_not_told_twice(
    tmp_path, names, count
):
    after = {"reward": 0.5, **{f"rewards/{name}/mean": 0.5 for name in names}}
    held_out = {f"eval_{name}": 0.25 for name in after}
    rows = [{"step": 0, **held_out}, {"step": 1, **after, **dict.fromkeys(list(after)[1:], 0)}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(json.dumps({"eval_after": after, "steps": 1}))
    page = page_of(tmp_path)
    assert page.text.count("/mean") == count and len(page.all("div", "card")) == 1 + count
    caption = "mean, before its weight training 0 held out 0.25"
    assert " ".join(page.text.split()).count(caption) == count
    assert len(page.all("svg")) == 2 + count


def test_each_cell_of_a_table_names_its_column_for_narrow_screens(tmp_path):
    rows = [["entropy", '"> <b>', EVIL]]
    page = page_with(tmp_path, table(("name", "first", "last"), rows), table(("", "first"), []))
    labels = [cell.get("data-label") for name, cell in page.tags if name in ("th", "td")]
    assert labels == [None, None, None, "name", "first", "last"] and len(page.all("table")) == 1
    assert "none" not in page.text and '"> <b>' + "\n" not in page.text and not page.all("b")
    assert len(page.all("script")) == 1


def test_an_unfinished_run_from_python_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null}\n{"step": 2, "rew')
    page = page_of(tmp_path)
    assert "unfinished" in page.text and "before" not in page.text and not page.all("svg")
    assert "Started from Python" in page.text


def test_what_is_no_run_is_refused_and_a_comparison_answers_with_its_page(tmp_path):
    for words in (r"metrics\.jsonl", "holds a comparison, not a run"):
        with pytest.raises(Refused, match=words):
            report_from_directory(tmp_path)
        (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "report.html").write_text("the page")
    assert report_from_directory(tmp_path).read_text() == "the page"


def test_a_damaged_table_of_completions_is_named_with_what_to_do(run):
    (run / "completions/step_000001.parquet").write_text("PAR1")
    with pytest.raises(Refused, match=r"step_000001.parquet.*Remove"):
        report_from_directory(run)


def test_three_prompts_of_a_step_stand_open(tmp_path):
    rows = [{"prompt": str(number), "completion": "c"} for number in range(8)]
    assert len(page_with(tmp_path, completions(rows)).all("article")) == 3 + 8


def test_an_evaluation_has_a_band_of_one_standard_error(run, monkeypatch):
    charts = []
    monkeypatch.setattr("tokenrl.runs.markup.svg", lambda chart, *_: charts.append(chart))
    report_from_directory(run)
    ((low, high),) = [curve.band for curve in charts[0].curves if curve.band]
    assert [*low, *high] == pytest.approx([0.115, 0.135])
