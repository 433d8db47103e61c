"""The time of each reward is recorded, and one that takes most of a step is named once."""

from __future__ import annotations

import json

import pytest

import tokenrl
from tokenrl.language.tasks.task import PromptTask
from toy_tasks.models import TinyModel


@pytest.mark.slow
def test_a_run_records_the_time_and_warns_once(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import time\ndef slow(completions, **_):\n    time.sleep(1.05)\n"
        "    return [float(i) for i in range(len(completions))]\n"
    )
    rows = [{"prompt": f"{x}{y}>"} for x in "abcd" for y in "abcd"]
    task = PromptTask("letters", rows[:12], rows[12:], None, max_completion_length=4)
    model = TinyModel(tuple("abcd>"), layers=1, hidden=16, heads=2, context=16)(0)
    tokenrl.train(
        model=model, task=task, reward=["slow.py:slow", "length(max=3)"], reward_timeout=60, eval_every=0,
        eval_generations=0, prompts_per_step=2, num_generations=2, max_steps=6, output_dir=tmp_path / "run",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "timings.jsonl").open()]
    assert len(lines) == 6
    for line in lines:  # without the evaluations, which take longer
        assert 1.1 <= line["rewards/slow/seconds"] < 2 and 0 <= line["rewards/length/seconds"] < 0.1
    assert "seconds" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("The reward slow took 1.") == 1 and "step 5: The reward slow" in said
    assert "The reward length" not in said
