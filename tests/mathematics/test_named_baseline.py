"""A baseline of the user's own, by its name: imported when used, written as text, sent to other processes."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch

from tokenrl.core import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.settings import arguments

FILE = """
import torch
from pathlib import Path
times = Path(__file__).with_suffix(".times")
times.write_text(times.read_text() + "x" if times.exists() else "x")
def half(totals, group_size, mask, valid):
    return torch.full_like(totals, 0.5)
def narrow(totals, **rows):
    return totals[:1]
def leaves(totals, **rows):
    raise SystemExit(0)
"""
SCORES, MASK = torch.tensor([0.0, 1.0, 1.0, 3.0]), torch.ones(4, 2)


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return str(tmp_path / "mine.py")


def advantages(estimator):
    return estimator.advantages(SCORES, MASK, group_size=2).policy


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "leaves",
            Stopped,
            r"The baseline '.*leaves' failed: it raised SystemExit: 0 \(mine.py, line",
        ),
        (
            "narrow",
            Refused,
            r"The baseline '.*mine.py:narrow' returned shape \(1,\).*one number per row",
        ),
    ],
)
def test_what_is_wrong_with_it_is_said(mine, name, error, words):
    estimator = Estimator(baseline=f"{mine}:{name}")
    with pytest.raises(error, match=words):
        advantages(estimator)


def test_the_named_function_is_the_baseline_and_is_imported_once_when_it_is_used(mine, tmp_path):
    spec = f"{mine}:half"
    estimator = Estimator(baseline=spec)
    assert not (tmp_path / "mine.times").exists()
    assert estimator.bias_status == "unknown" and not estimator.needs_groups
    for one in (
        estimator,
        dataclasses.replace(estimator, beta=0.1),
        dataclasses.replace(estimator),
    ):
        assert torch.equal(advantages(dataclasses.replace(one, beta=0.0)), SCORES - 0.5)
    assert (tmp_path / "mine.times").read_text() == "x"
    sent = pickle.loads(pickle.dumps(estimator))
    assert torch.equal(advantages(sent), SCORES - 0.5)
    assert sent == estimator == arguments(Estimator, {"baseline": spec}) and hash(sent) == hash(
        estimator
    )
    assert json.loads(json.dumps(dataclasses.asdict(estimator)))["baseline"] == spec
    assert estimator != Estimator() and estimator.reference == ""
