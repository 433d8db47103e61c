"""Pages of runs: what they tell, that nothing in them is run or asked for outside, and what is refused."""

import hashlib
import json
import math
import re
import shutil
from base64 import b64encode
from contextlib import closing

import pytest

from runs.pages import EVIL, Page
from tokenrl.errors import Refused
from tokenrl.runs.files import write_json
from tokenrl.runs.markup import Section, completions, table, write_page
from tokenrl.runs.metrics import MetricsLog, write_completions
from tokenrl.runs.origin import versions
from tokenrl.runs.plots import PALETTE
from tokenrl.runs.report import compare_runs, report_from_directory

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
def test_all_text_is_escaped_and_nothing_is_asked_for_outside(run):
    text = report_from_directory(run).read_text("utf-8")
    page = Page(text)
    assert text.count("<script") == 1 == text.count("</script") and "&lt;script&gt;" in text
    shown = page.text.replace('\\"', '"').count(EVIL)
    assert shown >= 2 + 1 + 1 + 10 + 30 + 1  # headings, card, texts, command
    assert "alert" not in text[text.index("<script") : text.index("</script")]
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    inside = re.sub(r'xlink:href="#', "", text.replace("</", ""))
    assert not re.search(r"""(src|href)=|@import|url\((?!#)|https?:|//[a-z]""", inside)


@pytest.mark.drawn
def test_no_control_character_of_a_run_stands_in_its_pages_whose_policy_lets_one_script_run(
    run, recwarn
):
    odd = "a\x00\x07\x1b[31m\x7f\x9b2J\u202e"
    config, summary = (
        json.loads((run / name).read_text()) for name in ("config.json", "summary.json")
    )
    write_json(run / "config.json", config | {"title": odd, "command": odd, "versions": {odd: odd}})
    write_json(run / "summary.json", summary | {"verdict": odd, "eval_after": {odd: 1.0}})
    write_completions(run / "completions", 11, [{"prompt": odd, odd: step} for step in (1, 2)])
    shutil.copytree(run, other := run.parent / "other")
    page, several = report_from_directory(run), compare_runs([run, other], run.parent / "both.html")
    for text in (page.read_text("utf-8"), several.read_text("utf-8")):
        assert not CONTROL.search(text) and r"a\x00\x07\x1b[31m\x7f\x9b2J\u202e" in text
        policy = re.search(
            r"default-src 'none'; style-src 'unsafe-inline'; script-src '([^']*)'", text
        )[1]
        script = text[text.index("<script>") + 8 : text.index("</script>")]
        assert policy == "sha256-" + b64encode(hashlib.sha256(script.encode()).digest()).decode()
    numbers = [
        json.loads(found["data-numbers"]) for found in Page(page.read_text("utf-8")).all("article")
    ]
    assert r"a\x00\x07\x1b[31m\x7f\x9b2J\u202e" in numbers[-1]  # by the name that the list shows
    assert not recwarn.list  # of glyphs


def test_the_light_colours_are_those_of_the_palette_and_each_has_a_dark_one(run):
    text = report_from_directory(run).read_text("utf-8")
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    first, second = (
        dict(re.findall(r"(--[a-z0-9]+): (#[0-9a-f]+)", part)) for part in (light, dark)
    )
    assert first.keys() == second.keys() == {"--page", "--card", *(f"--{name}" for name in PALETTE)}
    assert {name: first[f"--{name}"] for name in PALETTE} == PALETTE


def test_completions_are_folded_and_bear_the_numbers_by_which_they_are_sorted(run):
    text = report_from_directory(run).read_text("utf-8")
    before, _, _ = text.partition("All 30 completions")
    # each step has a single prompt
    assert before.count("<article") == 3 == before.count('class="few"')
    page = Page(text)
    numbers = [json.loads(found["data-numbers"]) for found in page.all("article", "sample")]
    assert [n["step"] for n in numbers[:3]] == [1, 2, 10]
    numbers = numbers[3:]
    assert [n["step"] for n in numbers] == [1] * 10 + [2] * 10 + [10] * 10
    assert numbers[0] == {
        "step": 1,
        "reward": 0.125,
        "rewards/a_b": None,
        "cut": 1,
        "characters": len(EVIL),
    }
    (form,) = page.all("form")
    assert "hidden" in form  # useless without the script, which shows it
    named = {found["name"] for kind in ("select", "input") for found in page.all(kind)}
    assert named == {"by", "order", "column", "search", "least", "most"}
    for step in range(11, 111):
        rows = [
            {"prompt": f"p{n // 8}", "completion": "c", "answer": "ab", "n": n} for n in range(64)
        ]
        write_completions(run / "completions", step, rows)
    (run / "completions" / "step_final.parquet").write_text("a file of somebody else")
    numbers = [json.loads(found["data-numbers"]) for found in page_of(run).all("article")]
    steps = sorted({n["step"] for n in numbers})
    assert steps[0] == 1 and steps[-1] == 110 and len(steps) == 8
    assert [n["step"] for n in numbers[:7]] == [1, *[steps[4]] * 3, *[110] * 3]
    # the first completion of each of three prompts
    assert [n["n"] for n in numbers[1:4]] == [
        0,
        8,
        16,
    ]
    assert [n["n"] for n in numbers[-16:]] == list(range(0, 64, 4)) and numbers[-1][
        "characters"
    ] == 1


def test_a_chat_is_shown_as_messages_with_roles_and_other_texts_as_they_are(tmp_path):
    rows = [{"prompt": json.dumps(CHAT), "completion": "a\x1b"}]
    rows += [{"prompt": '[{"role": 1}]', "completion": "[{no"}]
    calls = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    turns = [
        {"role": "assistant", "content": "sum", "tool_calls": calls},
        {"role": "tool", "content": "<3>"},
    ]
    rows += [{"prompt": "1", "completion": json.dumps(turns)}]
    page = page_with(tmp_path, completions(rows))
    assert len(page.all("div", "message")) == 2 * 4  # those that are open, and all
    assert len(page.all("div", "tool")) == 2
    for text in (
        "system",
        "be_brief",
        "a\\x1b",
        '[{"role": 1}]',
        "[{no",
        "sum",
        json.dumps(calls[0]),
        "<3>",
    ):
        assert text in page.text


@pytest.mark.parametrize("names, shown", [(["one"], 0), (["one", "two"], 2)])
def test_several_rewards_have_a_curve_each_and_the_mean_of_a_single_one_is_not_told_twice(
    tmp_path, names, shown
):
    after = {"reward": 0.5, **{f"rewards/{name}/mean": 0.5 for name in names}}
    held_out = {f"eval_{name}": 0.25 for name in after}
    rows = [{"step": 0, **held_out}, {"step": 1, **after, **dict.fromkeys(list(after)[1:], 0)}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(json.dumps({"eval_after": after, "steps": 1}))
    page = page_of(tmp_path)
    assert page.text.count("/mean") == shown and len(page.all("div", "card")) == 1 + shown
    words, caption = (
        " ".join(page.text.split()),
        "mean, before its weight training 0 held out",
    )
    assert words.count(f"{caption} 0.25") == shown and len(page.all("svg")) == 2 + shown
    shutil.copytree(tmp_path, other := tmp_path / "other")
    both = Page(compare_runs([tmp_path, other], tmp_path / "both.html").read_text("utf-8"))
    assert len(both.all("svg")) == 2 * 3 + shown - 2  # nobody was evaluated greedily


def test_each_cell_of_a_table_names_its_column_for_narrow_screens(tmp_path):
    rows = [["entropy", '"> <b>', EVIL]]
    page = page_with(tmp_path, table(("name", "first", "last"), rows), table(("", "first"), []))
    labels = [found.get("data-label") for name, found in page.tags if name in ("th", "td")]
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


@pytest.fixture
def made(tmp_path, monkeypatch):
    """`made(name, kind=..., after=..., **settings)`: a run in the current directory."""
    monkeypatch.chdir(tmp_path)

    def make(name, kind="train", after=None, **settings):
        (tmp_path / name).mkdir()
        rows = [{"step": 1, "reward": 0.5, "loss": 2.0}, {"step": 1, "eval_reward": 0.5}]
        config = {"kind": kind, "title": name, "command": name, "output_dir": name, **settings}
        summary = {"exit_reason": "finished", "eval_after": after, "loss_after": 2.0}
        texts = {
            "metrics.jsonl": "\n".join(map(json.dumps, rows)),
            "config.json": json.dumps(config),
        }
        for file, text in {**texts, "summary.json": json.dumps(summary), "report.html": ""}.items():
            (tmp_path / name / file).write_text(text)
        return name

    return make


def rows_of(page, heading):
    """The rows of the table below a heading."""
    part = page[page.index(f"<h2>{heading}") :]
    rows = re.findall("<tr.*?</tr>", part[: part.index("</table>")])
    return [[Page(cell).text for cell in re.findall("<t[hd].*?</t[hd]>", row)] for row in rows]


def test_numbers_stand_side_by_side_and_only_settings_that_differ_are_shown(made, tmp_path):
    rloo, grpo = {"baseline": "rloo", "scale": "none"}, {"baseline": "rloo", "scale": "group_std"}
    one = made(
        "one run", after={"reward": 0.5, "reward_stderr": 0.01}, task="a", seed=0, estimator=rloo
    )
    two = made(
        "two", after={"reward": 0.7, "pass@4": 1.0}, task="a", seed=1, lora_r=8, estimator=grpo
    )
    (tmp_path / "pages").mkdir()
    (tmp_path / "two" / "report.html").unlink()
    page = compare_runs([one, two], "pages/p.html").read_text("utf-8")
    header, loss = ["", "one run", "two"], ["loss of the last batch", "2", "2"]
    numbers, settings = rows_of(page, "Final numbers"), rows_of(page, "Settings that differ")
    assert numbers == [header, ["reward", "0.500 ± 0.010", "0.7"], loss, ["pass@4", "-", "1"]]
    scale, seed = ["estimator.scale", "none", "group_std"], ["seed", "0", "1"]
    assert settings == [header, scale, ["lora_r", "-", "8"], seed]
    text = Page(page).text
    assert "says nothing yet about their settings" in text and "do not measure the same" not in text
    assert text.count("two 0.5") == 2  # in the legends of training and held-out rewards
    assert [found["href"] for found in Page(page).all("a")] == ["../one%20run/report.html"]


def test_other_tasks_are_named_as_such_and_texts_are_escaped(made):
    page = compare_runs([made("one", task=EVIL), made("two", task="b", title=EVIL)]).read_text(
        "utf-8"
    )
    assert "differ in task, so their numbers do not measure the same" in page
    assert page.count("<script") == 1 and EVIL in Page(page).text
    page = Page(compare_runs([made("three", "sft"), made("four", "sft")]).read_text("utf-8"))
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
