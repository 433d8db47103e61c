"""A completion depends neither on the rows beside it nor on when the host looks at the batch."""

from dataclasses import replace

import pytest
import torch
from families import family_policy
from torch.testing import assert_close

from tokenrl.language.rollout import decoding
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.reading import Histories
from tokenrl.language.rollout.sampling import Sampling

PROMPTS = [[5, 9, 13, 21, 33], [40, 7], [3, 4, 5]]
LENGTH, SIZE = 18, 3
DRAWS = torch.rand(9, LENGTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
KEPT = Sampling(LENGTH, SIZE, keep_hidden=True, keep_score_norms=True, keep_distribution=True)
NUMBERS = ("logprobs", "entropy", "score_norms", "hidden", "sampling_distribution")
REGIMES = ("plain", "few at once", "turns")


def generated(policy, prompts=(0, 1, 2), sampling=KEPT, regime="plain"):
    """Completions of the prompts of these numbers, each with its own draws."""
    engine = TransformersGenerator(policy, 2 * SIZE if regime == "few at once" else None)
    draws = torch.cat([DRAWS[SIZE * i : SIZE * (i + 1)] for i in prompts])
    draws = draws[:, : sampling.max_completion_length]
    if regime == "turns":  # each row has a prompt of its own
        rows = [PROMPTS[i] for i in prompts for _ in range(SIZE)]
        one_each = replace(sampling, num_generations=1)
        return replace(engine, histories=Histories(2**30)).turn(
            range(len(rows)), rows, one_each, draws
        )
    rollout = engine.generate([PROMPTS[i] for i in prompts], sampling, draws)
    index = torch.arange(len(prompts)).repeat_interleave(sampling.group_size)
    assert torch.equal(rollout.prompt_index, index)
    rows = zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)
    read = [ids[mask].tolist() for ids, mask in rows]
    assert read == [PROMPTS[prompts[i]] for i in index]
    return rollout


def assert_same(actual, expected, rows):
    """The same tokens, and the same numbers up to rounding."""
    width = expected.mask[rows].any(dim=0).sum()
    assert torch.equal(actual.mask[:, :width], expected.mask[rows][:, :width])
    assert not actual.mask[:, width:].any()
    on = actual.mask[:, :width]
    ids = [rollout.completion_ids for rollout in (actual, expected)]
    assert torch.equal(ids[0][:, :width][on], ids[1][rows][:, :width][on])
    for name in NUMBERS:
        a, b = getattr(actual, name), getattr(expected, name)
        assert_close(a[:, :width], b[rows][:, :width], atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("look_every", [1, 8])
@pytest.mark.parametrize(
    ("family", "regime"),
    [*(("llama", regime) for regime in REGIMES), ("gpt2", "plain")],
)
def test_no_company_order_padding_or_late_look_changes_a_row(
    family, regime, look_every, monkeypatch
):
    policy = replace(family_policy(family), eos_ids=tuple(range(0, 64, 16)))
    expected = generated(policy)
    assert len(set(expected.mask.sum(dim=1).tolist())) > 3  # rows leave
    monkeypatch.setitem(decoding.LOOK_EVERY, "cpu", look_every)
    for order in ((0, 1, 2) * 4, (2, 0, 1), (1,), (2, 1)):
        rows = torch.cat([torch.arange(SIZE * i, SIZE * (i + 1)) for i in order])
        assert_same(generated(policy, order, regime=regime), expected, rows)
    shorter = generated(policy, sampling=replace(KEPT, max_completion_length=5), regime=regime)
    assert torch.equal(shorter.completion_ids, expected.completion_ids[:, :5])
