"""Rows are divided into passes at the least cost within the limits, and the padding that is left is a metric."""

import itertools
import math
import random

import pytest
import torch
from tiny_models import ENDS, make_learner, make_policy, one_step

from tokenrl.language.rollout.passes import Passes


def cost(parts, lengths, prompts, groups, tokens, rows, overhead):
    """Tokens that are computed and the overhead of the passes; infinite beyond the limits."""
    total = 0
    for part in parts:
        computed = len(part) * max(lengths[i] for i in part)
        computed += len({groups[i] for i in part}) * max(prompts[i] for i in part)
        if len(part) > 1 and (computed > tokens or len(part) > (rows or 99)):
            return math.inf
        total += computed + overhead
    return total


def divisions(blocks):
    """All divisions of blocks of rows, in their order, into passes."""
    for cuts in itertools.product([False, True], repeat=len(blocks) - 1):
        parts = [blocks[0]]
        for block, is_cut in zip(blocks[1:], cuts, strict=True):
            parts = [*parts, block] if is_cut else [*parts[:-1], parts[-1] + block]
        yield parts


def test_the_division_costs_the_least_of_all_within_the_limits():
    draw = random.Random(0)
    counts = set()
    for _ in range(300):
        n = draw.randint(1, 8)
        groups = sorted(draw.choices(range(4), k=n))
        lengths = draw.choices(range(1, 12), k=n)
        shapes = lengths, [[1, 30, 4, 9][group] for group in groups], groups
        limits = draw.choice([12, 60, 999]), draw.choice([None, 1, 3]), draw.choice([1, 6, 99])
        model = torch.nn.Linear(1, 1)
        passes = Passes(model=model, tokens_per_pass=limits[0], pass_overhead=limits[2])
        parts = passes.divide(shapes, limits[1])
        assert sorted(itertools.chain(*parts)) == [*range(n)]
        by_row = sorted(range(n), key=lambda i: -lengths[i])
        by_group = [[i for i in range(n) if groups[i] == group] for group in {*groups}]
        by_group.sort(key=lambda rows: -max(lengths[i] for i in rows))
        others = [*divisions([[i] for i in by_row]), *divisions(by_group)]
        assert cost(parts, *shapes, *limits) <= min(cost(p, *shapes, *limits) for p in others)
        counts.add(len(parts))
    assert counts >= {1, 2, 3, 8} and passes.divide(([], [], []), None) == []


@pytest.mark.parametrize("overhead", [1, 10**6])
def test_padding_is_the_share_of_columns_without_a_token(overhead):
    policy = make_policy()
    policy.eos_ids = ENDS
    sizes = {"prompts_per_step": 1, "num_generations": 12, "max_completion_length": 9}
    learner = make_learner(policy, pass_overhead=overhead, **sizes)
    masks, score = [], learner.score
    learner.score = lambda rows: masks.append(rows.mask) or score(rows)
    record = one_step(learner, prompts=["the cat"])
    columns = sum(mask.numel() for mask in masks)
    tokens = sum(int(mask.sum()) for mask in masks)
    assert (len(masks) == 1) == (overhead > 1) and sum(map(len, masks)) == 12
    assert record.metrics["padding"] == pytest.approx(1 - tokens / columns, abs=1e-6)
    assert (record.metrics["padding"] > 0.2) == (overhead > 1)
