"""Pages of runs: what they tell, that nothing in them is run or asked for outside, and what is refused."""

import hashlib
import json
import math
import re
from base64 import b64encode
from urllib.parse import unquote

import pytest
from refusals import refused

from runs.pages import EVIL, Page
from tokenrl.files import write_json
from tokenrl.runs.metrics import (
    append_rows,
    of_evaluation,
    read_metrics,
    replace_last_row,
    write_completions,
)
from tokenrl.runs.origin import versions
from tokenrl.runs.reader import read_run
from tokenrl.runs.report import report_from_directory

CHAT = [{"role": "system", "content": "be_brief"}, {"role": "user", "content": [{"type": EVIL}]}]


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "my run"
    run.mkdir()
    about = {"title": f"sorting {EVIL}", "command": f"tokenrl train {EVIL}", "versions": versions()}
    write_json(
        run / "config.json", {**about, "seed": 3, "solved": 0.9, "chat": True, "generator": "vllm"}
    )
    before = {"eval_reward": 0.125, "eval_reward_greedy": 0.2, "eval_reward_stderr": 0.01}
    append_rows(run, 0, before)
    for step in (1, 2, 3, 4):
        off = {"sampling/logp_difference/max": 1e-5 / step}
        row = {"reward": 0.5, "grad_norm": 2.0, "grad_clipped": float(step > 1), **off}
        append_rows(run, step, row)
    for step, text in ((1, EVIL), (2, "middle"), (10, "& last\n\x00\ud800")):
        row = {"prompt": CHAT, "completion": text, "reward": step / 8, "rewards/a_b": math.nan}
        write_completions(run / "completions", step, [row | {"cut": True}] * 20)
    after = {"reward": 0.87654, "reward_stderr": 0.0123, "pass@4": 0.5, "reward_greedy": 1, EVIL: 2}
    replace_last_row(run, read_metrics(run / "metrics.jsonl")[-1] | of_evaluation(after))
    ended = {"exit_reason": "completed", "steps": 4, "wall_seconds": 61, "tokens_per_second": 99.0}
    both = {"eval_before": {"reward": 0.125}, "eval_after": after}
    write_json(run / "summary.json", {**ended, **both, "verdict": EVIL})
    return run


def page_of(run):
    return Page(report_from_directory(run).read_text("utf-8"))


def page_with(path, *rows):
    """The page of a run with completions and nothing else."""
    append_rows(path, 1, {})
    write_completions(path / "completions", 1, rows)
    return page_of(path)


@pytest.mark.drawn
def test_the_page_needs_the_run_directory_alone_and_tells_its_numbers(run):
    page = page_of(run)
    for part in ("completed, 4 steps, 1:01, 99 tokens/s", "reward0.125 ± 0.010 → 0.877 ± 0.012", "pass@4- → 0.5",
                 "held out 0.877 ± 0.012", "solved: 0.9", '"seed": 3', '"python"', "To repeat",
                 "gradient before clipping training 2", "max_grad_norm scaled down; 1 means all training 1",
                 '"chat": true', "a middle and the last step"):  # fmt: skip
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
    inside = re.sub(r'xlink:href="#|xmlns[^"]*"[^"]*"', "", text.replace("</", ""))
    assert not re.search(r"""(src|href)=|@import|url\((?!#)|https?:|//[a-z]""", inside)
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert "alert" not in script


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
    page = page_with(tmp_path, *rows)
    assert len(page.all("div", "message")) == 2 * 4  # those that are open, and all
    assert len(page.all("div", "tool")) == 2
    texts = ("system", "be_brief", "a\\x1b", '[{"role": 1}]', "[{no", json.dumps(calls[0]), "<3>")
    assert all(text in page.text for text in texts)


def test_a_drawing_of_a_reward_is_an_image_and_no_markup(tmp_path):
    drawing = "<?xml version='1.0'?><svg onload='alarm(1)'><script>alarm(2)</script></svg>"
    rows = [{"prompt": "1", "completion": "<svg/>", "molecule": drawing, "answer": "C"}]
    page = page_with(tmp_path, *rows)
    images = [image["src"] for image in page.all("img")]
    kind, _, content = images[0].partition(",")
    assert len(images) == 2  # the one that is open, and all
    assert (kind, unquote(content)) == ("data:image/svg+xml", drawing)
    assert "<svg/>" in page.text and not page.all("svg") and "alarm" not in page.text


def test_an_unfinished_run_from_python_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": null}\n{"step": 2, "rew')
    page = page_of(tmp_path)
    assert "unfinished" in page.text and "before" not in page.text and not page.all("svg")
    assert "Started from Python" in page.text


def test_what_is_no_run_is_refused_and_a_comparison_answers_with_its_page(tmp_path):
    for words in (r"metrics\.jsonl", "holds a comparison, not a run"):
        with refused(words):
            report_from_directory(tmp_path)
        (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "report.html").write_text("the page")
    assert report_from_directory(tmp_path).read_text() == "the page"


def test_a_damaged_table_of_completions_is_named_with_what_to_do(run):
    (run / "completions/step_000001.parquet").write_text("PAR1")
    with refused(r"step_000001.parquet.*Remove"):
        report_from_directory(run)


def test_tokens_of_completions_are_text_with_their_numbers(tmp_path):
    tokens = {
        "tokens/text": [EVIL, "\n", "b", "<eos>"],
        "tokens/special": [False, False, False, True],
        "tokens/logprob": [-0.5, math.nan, -0.25, -1.0],
        "tokens/weight": [2.0, math.nan, -1.0, 0.0],
        "tokens/reference": [-0.75, math.nan, -0.25, -1.0],
    }
    row = {"prompt": "p", "completion": EVIL, "reward": 1.0}
    page = page_with(tmp_path, row | tokens, row)
    (container,) = {part["data-names"] for part in page.all("div", "tokens")}
    assert container == "logprob weight reference k1"
    values = [
        part["data-values"] for tag, part in page.tags if tag == "span" and "data-values" in part
    ]
    assert values[:4] == ["-0.5 2 -0.75 0.25", "nan nan nan nan", "-0.25 -1 -0.25 0", "-1 0 -1 0"]
    assert len(page.all("span", "given")) == len(page.all("span", "special")) == len(values) / 4
    assert page.text.count(EVIL) >= 2 and "tokens/" not in page.text


def test_an_episode_that_failed_before_its_first_token_has_a_page(tmp_path):
    """Its columns are empty lists, which have no type of their own."""
    tokens = {f"tokens/{name}": [] for name in ("text", "special", "logprob", "weight", "teacher")}
    row = {"prompt": "p", "completion": "", "ending": "failure", "failure": "reset raised KeyError"}
    assert "reset raised KeyError" in page_with(tmp_path, row | tokens).text
    assert len(read_run(tmp_path).tokens()) == 0


def test_a_page_with_some_of_the_completions_has_all_whose_tokens_were_kept(tmp_path):
    row = {"prompt": "p", "completion": "c", "reward": 1.0}
    tokens = {
        "tokens/text": ["HEAVY"],
        "tokens/special": [False],
        "tokens/logprob": [-1.0],
        "tokens/weight": [9.0],
    }
    rows = [row | tokens if number == 7 else row for number in range(64)]  # every fourth is shown
    assert "HEAVY" in page_with(tmp_path, *rows).text
