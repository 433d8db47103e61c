import json
import math
from contextlib import closing

import pytest
import torch

from tokenrl.errors import Refused
from tokenrl.runs.metrics import (
    MetricsLog,
    Stopwatch,
    peak_memory,
    read_completions,
    read_metrics,
    write_completions,
)


def write(folder, *rows):
    with closing(MetricsLog(folder)) as log:
        for step, metrics, timings in rows:
            log.write(step, metrics, timings)
    return folder / "metrics.jsonl"


def test_each_line_is_strict_json_and_on_disk_at_once(tmp_path):
    with closing(MetricsLog(tmp_path)) as log:
        log.write(1, {"reward": math.nan, "kl": math.inf, "entropy": torch.tensor(0.5), "b": 1, "a": None})
        text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "a": null, "b": 1, "entropy": 0.5, "kl": "Infinity", "reward": null}\n'
    assert (tmp_path / "timings.jsonl").read_text() == ""


def test_metrics_are_the_same_bytes_whatever_the_clock_and_the_order(tmp_path):
    for name, seconds in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        metrics = {"reward": 0.1, "loss": -0.2}
        metrics = metrics if name == "a" else dict(reversed(metrics.items()))
        write(tmp_path / name, (1, metrics, {"seconds": seconds}))
    first, second = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert first == second
    assert read_metrics(tmp_path / "b" / "timings.jsonl") == [{"step": 1, "seconds": 2.0}]


def test_torn_last_line_is_left_out(tmp_path):
    path = write(tmp_path, (0, {"eval_reward": 0.1}, None), (1, {"reward": 0.2}, None))
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines()[0]) + 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read_metrics(path) == [{"step": 0, "eval_reward": 0.1}]
    path.write_bytes(whole + b'{"step": 2, "x": "\xc3')  # cut inside a character
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_damage_before_the_last_line_is_refused(tmp_path):
    path = write(tmp_path, (0, {}, None))
    path.write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(Refused, match="Line 2"):
        read_metrics(path)
    with pytest.raises(Refused, match="absent"):
        read_metrics(tmp_path / "absent")


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, torch.zeros(2)])
def test_metrics_are_flat(tmp_path, value):
    with pytest.raises(TypeError, match="'x'"):
        write(tmp_path, (1, {"x": value}, None))


def test_completions_come_back(tmp_path):
    rows = [
        {"prompt": "1+1=", "completion": "2\n\x00é", "reward": 1, "advantage": 0.5, "ok": True},
        {
            "prompt": "\ud83d",
            "completion": "",
            "reward": 0.25,
            "advantage": math.nan,
            "ok": False,
            "extra": 7,
        },
    ]
    path = write_completions(tmp_path / "completions", 100, rows)
    assert path == tmp_path / "completions" / "step_000100.parquet"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    first, second = read_completions(path)
    assert first == {
        "prompt": "1+1=",
        "completion": "2\n\x00é",
        "reward": 1.0,
        "advantage": 0.5,
        "ok": True,
        "extra": None,
    }
    assert second["prompt"] == "?" and second["reward"] == 0.25 and math.isnan(second["advantage"])
    assert second["extra"] == 7 and second["ok"] is False


def test_chat_messages_and_mixtures_are_stored_as_json_text(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    rows = [{"prompt": messages, "mixed": 1, "empty": {}}, {"prompt": messages, "mixed": "a", "empty": {}}]
    first, _ = read_completions(write_completions(tmp_path, 1, rows))
    assert json.loads(first["prompt"]) == messages and first["mixed"] == "1" and first["empty"] == "{}"


def test_the_stopwatch_times_updates_only():
    watch = Stopwatch()
    assert watch.time(lambda: sum(range(10**5))) == sum(range(10**5))
    first = watch.last
    watch.time(lambda: None)
    assert 0 < watch.last < first and watch.total == pytest.approx(first + watch.last)
    assert watch.timings(30) == {"step_seconds": watch.last, "tokens_per_second": 30 / watch.total}


def test_the_peak_of_memory_does_not_fall(monkeypatch):
    held = bytearray(b"x") * (256 * 2**20)
    during = peak_memory()["peak_memory_gib"]
    del held
    assert during > 0.25
    assert peak_memory()["peak_memory_gib"] > 0.99 * during  # the kernel counts in batches of pages
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert peak_memory()["peak_cuda_memory_gib"] == 3
