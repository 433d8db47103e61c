"""The time of each reward is recorded, and one that takes most of a step is named once."""

from __future__ import annotations

import json

import tokenrl
from tokenrl.language.tasks.task import PromptTask
from tokenrl.language.training.reward_time import STEPS, RewardTime
from toy_tasks.models import TinyModel


def after(steps, **seconds):
    clock, timings = RewardTime(), {f"rewards/{name}/seconds": value for name, value in seconds.items()}
    timings["step_seconds"] = timings.pop("rewards/step/seconds")
    found = [clock.add(timings) for _ in range(steps)]
    return found[-1]


def test_a_reward_that_takes_most_of_the_steps_is_named():
    slow = after(STEPS, step=9.0, judge=8.1, length=0.1)
    assert list(slow) == ["judge"]
    assert slow["judge"].startswith(
        "The reward judge took 8.1 of 9.0 seconds per step in the mean of 5 steps"
    )
    assert after(STEPS - 1, step=9.0, judge=8.1) == {}  # the first calls may load something
    assert after(STEPS, step=0.9, judge=0.8) == {}  # fast enough
    assert after(STEPS, step=9.0, judge=4.4) == {}  # not most of the time


def test_the_mean_decides_and_not_one_step():
    clock = RewardTime()
    for step in range(20):
        found = clock.add({"step_seconds": 10.0, "rewards/judge/seconds": 9.0 if step == 19 else 0.1})
        assert found == {}


def test_a_run_records_the_time_and_warns_once(tmp_path, capsys, monkeypatch):
    for limit in ("SECONDS", "SHARE"):
        monkeypatch.setattr(f"tokenrl.language.training.reward_time.{limit}", 0.01)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import time\ndef slow(completions, **_):\n    time.sleep(0.1)\n"
        "    return [float(i) for i in range(len(completions))]\n"
    )
    rows = [{"prompt": f"{x}{y}>"} for x in "abcd" for y in "abcd"]
    task = PromptTask("letters", rows[:12], rows[12:], None, max_completion_length=4)
    model = TinyModel(tuple("abcd>"), layers=1, hidden=16, heads=2, context=16)(0)
    tokenrl.train(
        model=model, task=task, reward=["slow.py:slow", "length(max=3)"], reward_timeout=60, eval_every=STEPS,
        prompts_per_step=2, num_generations=2, max_steps=STEPS + 2, output_dir=tmp_path / "run",
    )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "timings.jsonl").open()]
    assert len(lines) == STEPS + 2
    for line in lines:  # without the evaluations, which take longer
        assert 0.1 <= line["rewards/slow/seconds"] < 0.28 and 0 <= line["rewards/length/seconds"] < 0.1
    assert "seconds" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("The reward slow took 0.") == 1 and f"step {STEPS}: The reward slow" in said
    assert "The reward length" not in said
