"""A state is written and read back bit for bit, and copied without its tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tokenrl.errors import Refused
from tokenrl.runs import states
from tokenrl.runs.states import frozen, read_state, versions, write_state


def test_all_kinds_of_values_come_back(tmp_path):
    tensors = {
        "half": torch.tensor([1.5, -0.0, math.nan], dtype=torch.bfloat16),
        "count": torch.tensor(2**62),
        "none": torch.empty(0, 3),
        "turned": torch.arange(6.0).reshape(2, 3).T,
    }
    arrays = {
        "scalar": np.array(0.1),
        "bits": np.array([[True], [False]]),
        "wide": np.arange(3, dtype=np.uint64),
    }
    plain = {
        "numbers": [0.1 + 0.2, -0.0, math.inf, -math.inf, 2**200, -1, 5e-324],
        "rest": [None, True, "a\u2028\U0001f600", [], {}, [[1], [2.0]]],
        "nested": [{"<tensor>": "a name that means something", "other": 1}],
    }
    write_state(tmp_path, {"tensors": tensors, "arrays": arrays, "plain": plain, "late": lambda: [math.pi]})
    found = read_state(tmp_path)
    assert found["plain"] == plain and found["late"] == [math.pi]
    assert math.copysign(1, found["plain"]["numbers"][1]) == -1
    for name, tensor in tensors.items():
        again = found["tensors"][name]
        assert again.dtype == tensor.dtype and again.shape == tensor.shape
        assert again.contiguous().view(-1).view(torch.uint8).tolist() == (
            tensor.contiguous().view(-1).view(torch.uint8).tolist()
        )
    for name, array in arrays.items():
        again = found["arrays"][name]
        assert (again.dtype, again.shape) == (array.dtype, array.shape) and (again == array).all()


def test_nan_comes_back(tmp_path):
    write_state(tmp_path, {"value": math.nan, "numpy": np.float64(0.5)})
    found = read_state(tmp_path)
    assert math.isnan(found["value"]) and found["numpy"] == 0.5


@pytest.mark.parametrize(
    ("state", "words"), [({"a": {1: 2}}, "the key 1"), ({"a": [{1, 2}]}, "the state /a/0 is a set")]
)
def test_what_cannot_be_read_back_is_not_written(tmp_path, state, words):
    with pytest.raises(TypeError, match=words):
        write_state(tmp_path, state)
    with pytest.raises(Refused, match="no state from which a run can continue"):
        read_state(tmp_path)


def test_a_frozen_state_stays_and_tells_which_tensors_have_changed():
    weight, inside = torch.zeros(2), torch.zeros(1)
    live = {"steps": [1.0], "rows": [[1], {"weight": inside}], "array": np.zeros(1), "weight": weight}
    kept, before = frozen(live), versions(live)
    live["steps"].append(2.0)
    live["rows"][0].append(2)
    live["array"] += 1
    assert kept["steps"] == [1.0] and kept["rows"][0] == [1] and kept["array"].tolist() == [0.0]
    assert kept["weight"] is weight and versions(live) == before
    inside += 1
    assert versions(live) != before and versions(live) == versions(kept)


def test_a_number_for_each_step_is_copied_at_once(monkeypatch):
    """Otherwise each step of a long run would take longer than the one before."""
    called = []
    for name, function in (("frozen", frozen), ("versions", versions)):
        monkeypatch.setattr(states, name, lambda value, own=function: called.append(1) or own(value))
    history = {"entropies": [0.5] * 10_000}
    assert states.frozen(history) == history and states.versions(history) == []
    assert len(called) == 4
