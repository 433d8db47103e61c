import json
import math

import torch
from refusals import refused

from tokenrl.runs.metrics import append_rows, read_completions, read_metrics, write_completions


def write(folder, *rows):
    for row in rows:
        append_rows(folder, *row)
    return folder / "metrics.jsonl"


def test_each_line_is_strict_json_on_disk_at_once_and_the_same_whatever_the_clock_and_the_order(
    tmp_path,
):
    row = {"reward": math.nan, "kl": math.inf, "entropy": torch.tensor(0.5), "b": 1, "a": None}
    append_rows(tmp_path, 1, row)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert (tmp_path / "timings.jsonl").read_text() == ""
    append_rows(tmp_path, 2, {"b": 1}, {"seconds": 2.0})
    assert (
        text == '{"step": 1, "a": null, "b": 1, "entropy": 0.5, "kl": "Infinity", "reward": null}\n'
    )
    assert read_metrics(tmp_path / "timings.jsonl") == [{"step": 2, "seconds": 2.0}]


def test_torn_last_line_is_left_out(tmp_path):
    path = write(tmp_path, (0, {"eval_reward": 0.1}), (1, {"reward": 0.2}))
    whole = path.read_bytes()
    for cut in range(len(whole.splitlines()[0]) + 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read_metrics(path) == [{"step": 0, "eval_reward": 0.1}]
    path.write_bytes(whole + b'{"step": 2, "x": "\xc3')  # cut inside a character
    assert [row["step"] for row in read_metrics(path)] == [0, 1]


def test_damage_before_the_last_line_is_refused(tmp_path):
    (tmp_path / "x").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    for name, words in (("x", "Line 2"), ("absent", "absent")):
        with refused(words):
            read_metrics(tmp_path / name)


def test_completions_come_back_and_chat_messages_and_mixtures_as_json_text(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    full = {
        "prompt": "2\n\x00é",
        "reward": 1,
        "advantage": math.nan,
        "ok": True,
        "chat": chat,
        "mixed": 1,
    }
    rows = [full, {"prompt": "\ud83d", "reward": 0.25, "chat": chat, "mixed": "a", "extra": 7}]
    path = write_completions(tmp_path / "completions", 100, rows)
    assert [entry.name for entry in path.parent.iterdir()] == ["step_000100.parquet"]
    first, second = read_completions(path)
    assert math.isnan(first.pop("advantage")) and json.loads(first.pop("chat")) == chat
    assert first == {"prompt": "2\n\x00é", "reward": 1.0, "ok": True, "mixed": "1", "extra": None}
    assert (second["prompt"], second["reward"], second["ok"], second["extra"]) == (
        "?",
        0.25,
        None,
        7,
    )
