"""Files written whole: strict JSON, a failed write leaves the old file, a pipe is written to as it is."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from tokenrl.runs.files import write_json

VALUES = [  # and how they come back
    ({"a": math.nan}, {"a": None}),
    ((math.inf, -math.inf), ["Infinity", "-Infinity"]),
    (torch.tensor([1.0, math.nan]), [1.0, None]),
    (np.float32(0.5), 0.5),
    ({"b", "a"}, ["a", "b"]),
    ({1: (1, {math.inf})}, {"1": [1, ["Infinity"]]}),
    (torch.float32, "torch.float32"),
    (json.dumps, "json:dumps"),
    ("\ud800", "?"),
    (True, True),
]


def test_json_is_strict(tmp_path):
    values = {str(index): value for index, (value, _) in enumerate(VALUES)}
    write_json(tmp_path / "x.json", values)
    text = (tmp_path / "x.json").read_text("utf-8")
    back = json.loads(text, parse_constant=pytest.fail)
    assert [back[index] for index in values] == [expected for _, expected in VALUES]
