import io
import math
import re

import pytest

from tokenrl.runs.console import Console
from tokenrl.runs.output import measured

AFTER = {"pass@8": 1.0, "reward": 0.875, "reward_stderr": 0.0123}
SUMMARY = {"exit_reason": "completed", "steps": 40, "wall_seconds": 75.2, "tokens_per_second": 12345.6,
           "eval_before": {"reward": 0.125}, "eval_after": AFTER}  # fmt: skip


def use_everything(console):
    console.start("RLOO on [red]task[/red]", {"model": "tiny :smile:", "parameters": 12})
    for step in range(1, 41):
        evaluation = {"eval_reward_greedy": 0.25} if step == 4 else {}
        console.step(step, 40, {"reward": step / 40, "tokens_per_second": 1000.0, **evaluation})
    row = {"prompt": "a[b]\n\x1b[31m", "completion": "x" * 500, "reward": 1, "advantage": -0.5}
    console.completions_table([row])
    console.note("model runs/[a]/model")
    console.warn("all groups [bold] equal")
    console.finish({"exit_reason": "odd\x1b[2J", "eval_after": {"odd\x9b": 1.0}})
    console.finish(SUMMARY)


def printed(**options):
    file = io.StringIO()
    use_everything(Console(file=file, **options))
    return file.getvalue()


def test_a_notebook_gets_the_lines_of_a_log_and_quiet_prints_nothing(monkeypatch, capfd):
    log = printed(every=10)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # ipykernel passes for a terminal
    # A busy machine may count another second until the end.
    assert re.sub("ETA .*", "", printed(every=10)) == re.sub("ETA .*", "", log)
    assert printed(quiet=True) == "" and capfd.readouterr() == ("", "")


def test_log_gets_plain_lines_each_k_steps():
    text = printed(every=10)
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 2, 4, 10, 20, 30, 40]
    assert lines[0] == "step  1/40  training reward 0.025  1,000 tokens/s"
    rewards = "training reward 0.25  held-out greedy reward 0.25"
    assert lines[3].startswith(f"step 10/40  {rewards}  1,000 tokens/s  ETA 0:")
    assert "ETA" not in lines[-1] and "\x1b" not in text and "\r" not in text


def test_texts_are_shown_as_they_are_and_numbers_with_their_errors_side_by_side():
    text = printed()
    for part in (
        "[red]task[/red]",
        ":smile:",
        "[bold] equal",
        "runs/[a]/model",
        r"a[b]\n\x1b[31m",
        "…",
    ):
        assert part in text
    assert not set("\x1b\x9b") & set(text) and r"odd\x9b" in text and r"odd\x1b[2J" in text
    assert "loss is no measure of progress" in " ".join(text.split())
    assert "x" * 100 not in "".join(text.split()) and "reward_stderr" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["reward", "0.125", "0.875", "±", "0.012"] in rows and ["pass@8", "-", "1"] in rows
    assert "completed, 40 steps, 1:15, 12,346 tokens/s" in text


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.91234, 0.0123, "0.912 ± 0.012"),
        (1234.5, 67.8, "1234 ± 68"),
        (0.94, 0.0, "0.94 ± 0"),
        (0.5, None, "0.5"),
        (None, 0.1, "-"),
        (0.5, math.nan, "0.5"),
        (1, 3e-9, "1 ± 3e-09"),
        (0.1, 2e-17, "0.1 ± 0"),
        (0.0, 1e-16, "0 ± 0"),
        (1e9, 1e-7, "1e+09 ± 0"),
    ],
)
def test_numbers_have_the_figures_that_their_errors_leave(value, error, text):
    assert measured(value, error) == text
