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


def divisions(order):
    """All divisions of rows, in their order, into passes."""
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        at = [0, *(i for i, is_cut in enumerate(cuts, 1) if is_cut), len(order)]
        yield [order[a:b] for a, b in itertools.pairwise(at)]


def test_the_division_costs_the_least_of_all_within_the_limits():
    draw = random.Random(0)
    counts = set()
    for _ in range(300):
        n = draw.randint(1, 8)
        groups = sorted(draw.choices(range(4), k=n))
        lengths = draw.choices(range(1, 12), k=n)
        shapes = lengths, [[1, 30, 4, 9][group] for group in groups], groups
        tokens, rows, overhead = (draw.choice(x) for x in ([12, 60, 999], [None, 1, 3], [1, 6, 99]))
        model = torch.nn.Linear(1, 1)
        passes = Passes(model=model, tokens_per_pass=tokens, pass_overhead=overhead)
        parts = passes.divide(shapes, rows)
        assert sorted(itertools.chain(*parts)) == [*range(n)]
        others = divisions(sorted(range(n), key=lambda i: -lengths[i]))
        least = min(cost(other, *shapes, tokens, rows, overhead) for other in others)
        assert cost(parts, *shapes, tokens, rows, overhead) <= least
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
    share = torch.cat([mask.flatten() for mask in masks]).double().mean()
    assert (len(masks) == 1) == (overhead > 1)
    assert record.metrics["padding"] == pytest.approx(1 - share.item(), abs=1e-6)
    assert (record.metrics["padding"] > 0.2) == (overhead > 1)
