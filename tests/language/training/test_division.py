"""Rows are divided into passes at the least cost, and the gradient stays that of one pass."""

import itertools
import math
import random

import pytest
import torch
from tiny_models import (
    ENDS,
    apart,
    completions,
    gradient,
    make_learner,
    make_policy,
    one_step,
    scored,
)

from tokenrl.core.estimator import Estimator
from tokenrl.language.rollout.forward import choose_forward
from tokenrl.language.rollout.passes import Passes
from tokenrl.language.rollout.scoring import USUAL, score_in_parts
from tokenrl.language.supervised.arguments import SftArguments
from tokenrl.language.supervised.fit import SupervisedTraining


def cost(parts, lengths, prompts, groups, *, tokens, rows, overhead):
    """Tokens that are computed and the overhead of the passes; infinite beyond the limits."""
    total = 0
    for part in parts:
        width = max(prompts[i] for i in part)
        computed = len(part) * max(lengths[i] for i in part)
        computed += len({groups[i] for i in part}) * width
        if len(part) > 1 and (computed > tokens or len(part) > (rows or len(part))):
            return math.inf
        total += computed + overhead
    return total


def contiguous(blocks):
    """All divisions of blocks of rows, in their order, into passes."""
    for cuts in itertools.product([False, True], repeat=len(blocks) - 1):
        parts = [[*blocks[0]]]
        for block, is_cut in zip(blocks[1:], cuts, strict=True):
            parts += [[]] * is_cut
            parts[-1] = parts[-1] + block
        yield parts


def test_the_division_costs_the_least_of_all_divisions_within_the_limits():
    draw = random.Random(0)
    sizes = []
    for _ in range(400):
        n = draw.randint(1, 8)
        groups = sorted(draw.choices(range(4), k=n)) if draw.random() < 0.7 else [*range(n)]
        lengths = draw.choices(range(1, 12), k=n)
        prompts = [[1, 30, 4, 9, 2, 6, 5, 3][group] for group in groups]
        limits = {"tokens": draw.choice([12, 60, 999]), "rows": draw.choice([None, 1, 3])}
        limits["overhead"] = draw.choice([1, 6, 25, 999])
        shapes = lengths, prompts, groups
        passes = Passes(
            model=torch.nn.Linear(1, 1),
            tokens_per_pass=limits["tokens"],
            pass_overhead=limits["overhead"],
        )
        parts = passes.divide(shapes, limits["rows"])
        assert sorted(itertools.chain(*parts)) == [*range(n)] and parts == [*map(sorted, parts)]
        longest = [max(lengths[i] for i in part) for part in parts]
        if len({*groups}) == n:  # each row has a prompt of its own
            assert longest == sorted(longest, reverse=True)
        by_row = sorted(range(n), key=lambda i: -lengths[i])
        by_group = [[i for i in range(n) if groups[i] == group] for group in {*groups}]
        by_group.sort(key=lambda rows: -max(lengths[i] for i in rows))
        divisions = [*contiguous([[i] for i in by_row]), *contiguous(by_group)]
        least = min(cost(division, *shapes, **limits) for division in divisions)
        assert cost(parts, *shapes, **limits) <= least < math.inf
        sizes.append(len(parts))
    assert {1, 2, 3, 8} <= {*sizes}


def test_many_rows_are_divided_within_the_limits_and_nothing_is_divided_without_padding():
    draw = random.Random(0)
    lengths = [draw.randint(1, 75) for _ in range(600)]
    groups = [i // 8 for i in range(600)]
    shapes = lengths, [10] * 600, groups
    passes = Passes(model=torch.nn.Linear(1, 1), tokens_per_pass=4000, pass_overhead=250)
    parts = passes.divide(shapes, 100)
    limits = {"tokens": 4000, "rows": 100, "overhead": 250}
    by_row = sorted(range(600), key=lambda i: -lengths[i])
    equal = [by_row[start : start + 50] for start in range(0, 600, 50)]
    assert cost(parts, *shapes, **limits) < 1.01 * cost(equal, *shapes, **limits) < math.inf
    assert passes.divide(([30] * 80, [10] * 80, groups[:80]), None) == [[*range(80)]]
    assert passes.divide(([], [], []), None) == []
    # Whole groups in a pass where their prompts are long, and the limits ask for several passes.
    long = Passes(model=torch.nn.Linear(1, 1), tokens_per_pass=999, pass_overhead=1)
    parts = long.divide(([3, 4, 5, 9] * 2, [100] * 8, [0] * 4 + [1] * 4), 6)
    assert parts == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("prompts", [["the cat"], ["the cat", "a", "count to ten one two"]])
def test_the_gradient_is_that_of_one_pass(prompts, share, dtype, tolerance):
    """With a single prompt its group is divided; the reference is scored in the same passes."""

    def step(**options):
        policy = make_policy(dtype=dtype, initializer_range=0.1)
        policy.eos_ids = ENDS
        policy.reference = make_policy(dtype=dtype, seed=1).model.requires_grad_(False)
        size = {"prompts_per_step": len(prompts), "num_generations": 12 // len(prompts)}
        estimator = Estimator(baseline="rloo", beta=0.1, entropy_coef=0.01)
        learner = make_learner(policy, estimator, max_completion_length=9, **size, **options)
        passes = []
        real = learner.score
        learner.score = lambda rows: passes.append(rows.mask) or real(rows)
        record = one_step(scored(learner, share_prompt=share), prompts=prompts)
        return gradient(policy.model), record.metrics, passes

    whole, metrics, (mask,) = step(pass_overhead=10**6)
    assert whole.norm() > 0.01 and mask.shape[0] == 12
    tokens = int(mask.sum())
    assert metrics["padding"] == pytest.approx(1 - tokens / mask.numel(), abs=1e-6) and tokens < 90
    divided, others, masks = step(pass_overhead=1)
    assert len(masks) > 2 and sum(map(len, masks)) == 12
    columns = sum(mask.numel() for mask in masks)
    assert others["padding"] == pytest.approx(1 - tokens / columns, abs=1e-6)
    assert others["padding"] < metrics["padding"] / 2
    assert apart(divided, whole) < tolerance
    rest = {name: value for name, value in metrics.items() if name != "padding"}
    assert {name: others[name] for name in rest} == pytest.approx(rest, rel=1e-4, abs=1e-6)


def test_a_batch_of_demonstrations_has_the_gradient_of_one_pass():
    def update(**options):
        policy = make_policy("gpt2", dtype="float64", initializer_range=0.1)
        settings = {"batch_size": 16, "max_steps": 1, "learning_rate": 0.01, "max_grad_norm": 0.0}
        args = SftArguments(task="rows", training_attention="as_loaded", **settings, **options)
        forward, computing = choose_forward(args, policy, length=8)
        pairs = [([3, 4, 5][: 1 + n % 3], [*range(10, 11 + n)]) for n in range(16)]
        training = SupervisedTraining(policy, pairs, args, forward)
        passes = []
        real = training.loss
        training.loss = lambda rows, batch: passes.append(rows) or real(rows, batch)
        metrics = training.update()
        return gradient(policy.model), metrics, passes, computing["pass_overhead"], policy.size

    whole, metrics, passes, overhead, size = update()
    assert len(passes) == 1 and overhead == math.ceil(250_000 / math.sqrt(size))
    assert metrics["padding"] == pytest.approx(1 - 136 / 256)  # completions of 1 to 16 tokens
    divided, others, passes, overhead, _ = update(pass_overhead=20)
    assert overhead == 20 and 2 < len(passes) < 16
    columns = sum(len(rows) * (max(rows) + 1) for rows in passes)
    assert others["padding"] == pytest.approx(1 - 136 / columns)
    assert apart(divided, whole) < 1e-12 and others["loss"] == pytest.approx(metrics["loss"])


def test_scores_without_a_gradient_keep_the_order_of_the_rows():
    policy = make_policy(dtype="float64")
    prompts = [policy.encode(text) for text in ("the cat", "a")]
    rows = completions(policy, prompts, num_generations=4, max_completion_length=7)
    parts = [torch.tensor(part) for part in ([6, 1], [0, 7, 5], [2, 3, 4])]
    whole = score_in_parts(policy.model, rows, USUAL, entropy=True)
    divided = score_in_parts(policy.model, rows, USUAL, parts=parts, entropy=True)
    for one, other in zip(whole[:2], divided[:2], strict=True):
        torch.testing.assert_close(one[rows.mask], other[rows.mask], rtol=0, atol=1e-12)
