"""Files written whole: strict JSON, a failed write leaves the old file, a pipe is written to as it is."""

from __future__ import annotations

import json
import math
import os
import threading

import numpy as np
import pytest
import torch

from tokenrl.errors import Stopped
from tokenrl.runs.files import write_json, write_text


def strict(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_json_is_strict_and_infinities_come_back(tmp_path):
    value = {
        "nan": math.nan, "inf": math.inf, "down": -math.inf, "tensor": torch.tensor([1.0, math.nan]),
        "scalar": np.float32(0.5), "count": np.int64(3), "nested": {"a": (1, {math.inf})}, "set": {"b", "a"},
        "type": torch.float32, "function": json.dumps, "surrogate": "\ud800", "flag": True,
    }  # fmt: skip
    write_json(tmp_path / "x.json", value)
    back = strict((tmp_path / "x.json").read_text("utf-8"))
    assert back["nan"] is None and back["tensor"] == [1.0, None] and back["flag"] is True
    assert float(back["inf"]) == math.inf and float(back["down"]) == -math.inf
    assert (
        back["scalar"] == 0.5 and back["count"] == 3 and back["nested"] == {"a": [1, ["Infinity"]]}
    )
    assert (
        back["set"] == ["a", "b"]
        and back["type"] == "torch.float32"
        and back["function"] == "json:dumps"
    )
    assert back["surrogate"] == "?"


def test_failed_write_stops_and_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(tmp_path / "x.json", {"a": 1})

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Stopped, match="No space left") as caught:
        write_json(tmp_path / "x.json", {"a": 2})
    assert isinstance(caught.value.__cause__, OSError)
    assert files(tmp_path) == {"x.json": b'{\n  "a": 1\n}\n'}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_written_to_and_stays(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "hello")
    reader.join()
    assert read == ["hello"] and (tmp_path / "pipe").is_fifo()
