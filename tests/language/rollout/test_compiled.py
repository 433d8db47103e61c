"""Compiled code for sampling: the same completions for all sizes, and the model itself where it fails."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_models import completions, make_policy

from tokenrl.language.rollout.compiled import CACHE, CompiledStep, logits_after
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling

PADDED, ALIKE = [[5, 9, 13, 21], [40, 7]], [[5, 9, 13], [40, 7, 8], [3, 4, 5]]


def sampled(policy, prompts, length, code):
    policy.eos_ids = tuple(range(0, 60, 9))  # rows leave the batch one by one
    draws = torch.rand(4 * len(prompts), length, generator=torch.Generator().manual_seed(1))
    return TransformersGenerator(policy, compiled=code).generate(prompts, Sampling(length, 4), draws)


@pytest.mark.slow
def test_code_for_all_sizes_gives_the_same_completions(monkeypatch, tmp_path):
    from torch._dynamo.utils import counters

    monkeypatch.setenv(CACHE, str(tmp_path))
    policy, code = make_policy(), CompiledStep()
    counters.clear()
    for prompts, length in ((PADDED, 6), (ALIKE, 9), (PADDED, 12), (ALIKE, 5)):
        expected, found = (sampled(policy, prompts, length, one) for one in (None, code))
        assert torch.equal(found.completion_ids, expected.completion_ids)
        torch.testing.assert_close(found.logprobs, expected.logprobs, atol=2e-5, rtol=0)
    assert not code.failure
    assert counters["stats"]["unique_graphs"] <= 4


def test_code_that_fails_leaves_the_cache_as_it_was(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    policy, code, calls = make_policy(), CompiledStep(), []

    def fail(model, token, arguments):
        logits_after(model, token, arguments)  # the cache holds the token already
        calls.append(1)
        raise RuntimeError("no compiler was found")

    code._code = fail
    expected, found = (sampled(policy, PADDED, 6, one) for one in (None, code))
    assert torch.equal(found.completion_ids, expected.completion_ids)
    assert torch.equal(found.logprobs, expected.logprobs)
    assert code.failure == "RuntimeError: no compiler was found" and len(calls) == 1


@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_code_is_kept_where_nobody_else_can_write(mode, monkeypatch, tmp_path):
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "tokenrl" / "compiled"
    place.mkdir(parents=True)
    place.chmod(mode)
    CompiledStep()
    kept = os.environ[CACHE]
    monkeypatch.delenv(CACHE)
    assert (kept == str(place)) == (mode == 0o700)
    assert not os.stat(kept).st_mode & 0o022


def test_a_single_row_is_left_to_the_model(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    code = CompiledStep()
    code._code = lambda *_: pytest.fail("compiled")
    how = {"num_generations": 1, "max_completion_length": 4}
    policy = make_policy()
    expected = completions(policy, [[5, 6, 7]], **how)
    draws = torch.full((1, 4), 0.5)
    found = TransformersGenerator(policy, compiled=code).generate([[5, 6, 7]], Sampling(4), draws)
    assert found.mask.shape[0] == expected.mask.shape[0] == 1
