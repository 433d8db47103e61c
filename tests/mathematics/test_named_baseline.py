"""A baseline of the user's own, by its name: imported when used, written as text, sent to other processes."""

from __future__ import annotations

import dataclasses
import json
import pickle

import pytest
import torch

from tokenrl.core import Estimator
from tokenrl.errors import Refused, Stopped
from tokenrl.lab import measure_bias
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


STEP = {
    "logprobs": torch.tensor([[-1.0, -2], [-3, -4], [-5, torch.nan], [-6, -7]]),
    "sampling_logprobs": torch.tensor([[-1.5, -2], [-3, -4], [-5, torch.nan], [-6, -7]]),
    "ref_logprobs": torch.tensor([[-1.0, -2.5], [-3, -4], [-5, torch.inf], [-6, -7]]),
    "entropy": torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, torch.nan], [0.6, 0.7]]),
    "components": torch.tensor([[0.0, 0], [1, 0], [1, 0], [1, 2]]),
    "data": {"level": [1, 2, 3, 4], "tags": [["x"], [], [], []]},
}
ROWS = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1]])


def test_a_function_gets_copies_of_what_it_names():
    """Numbers of tokens are 0 off the mask, lengths count actions, and a row without turns has one."""
    into = {}

    def sees(totals, logprobs, ref_logprobs, entropy, components, lengths, turns, level, tags, x=3):
        into.update(level=level, x=x, numbers=[logprobs, ref_logprobs, entropy])
        into.update(counts=[lengths.tolist(), turns.tolist()], components=components.clone())
        for value in (logprobs, ref_logprobs, entropy, components, lengths, turns):
            value += 1
        tags[0].clear()
        return totals * 0

    Estimator(baseline=sees).advantages(SCORES, ROWS, group_size=2, **STEP)
    assert (into["level"], into["x"], STEP["data"]["tags"][0]) == ([1, 2, 3, 4], 3, ["x"])
    assert into["counts"] == [[2, 2, 1, 2], [1, 1, 1, 1]]
    for name, seen in zip(("logprobs", "ref_logprobs", "entropy"), into["numbers"], strict=True):
        torch.testing.assert_close(seen - 1, torch.where(ROWS.bool(), STEP[name], 0))
    assert torch.equal(into["components"], STEP["components"]) and STEP["entropy"][0, 0] < 1


def test_in_turns_it_gets_sums_over_each_turn_and_their_number():
    into = {}

    def sees(totals, mask, rewards, logprobs, entropy, lengths, turns):
        into.update(locals())
        return totals

    tokens = torch.tensor([[0, 0, 1], [0, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1]])
    logprobs = -torch.arange(1.0, 7).view(2, 3)
    step = {"turns": tokens, "logprobs": logprobs, "entropy": -logprobs, "group_size": 2}
    Estimator(baseline=sees).advantages(torch.ones(2), mask, **step)
    assert into["mask"].long().tolist() == [[1, 1, 0], [1, 0, 0]]
    assert into["logprobs"].tolist() == [[-3, -3, 0], [-10, 0, 0]]
    assert into["entropy"].tolist() == [[3, 3, 0], [10, 0, 0]]
    assert into["lengths"].tolist() == [3, 2] and into["turns"].tolist() == [2, 1]


def test_a_name_that_is_not_there_is_refused_with_those_that_are():
    def misnamed(totals, logprob):
        return totals

    def unrounded(totals, entropy):
        return totals

    with pytest.raises(
        Refused, match=r"'misnamed' has .* 'logprob' that.*'logprobs'\?.* entropy.* level"
    ):
        Estimator(baseline=misnamed).advantages(SCORES, ROWS, group_size=2, **STEP)
    for call in (advantages, measure_bias):
        with pytest.raises(Refused, match=r"has a parameter 'logprob'.*Available: .*group_size"):
            call(Estimator(baseline=misnamed))
    with pytest.raises(Refused, match="'unrounded' has a parameter 'entropy'"):
        advantages(Estimator(baseline=unrounded))


def test_what_looks_at_its_own_sample_is_unknown_by_its_form_and_a_wrong_claim_is_found():
    def careless(totals, group_size, logprobs):
        return logprobs.sum(1)

    assert Estimator(baseline=careless).bias_status == "unknown"
    assert measure_bias(Estimator(baseline=careless)).found == "biased"
    careless.bias = "exact", "it looks harmless"
    assert not measure_bias(Estimator(baseline=careless)).ok

    def careful(totals, group_size, entropy):
        others = entropy.sum(1).view(-1, group_size)
        return (others.sum(1, keepdim=True) - others).flatten()

    assert measure_bias(Estimator(baseline=careful)).found == "exact"


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
