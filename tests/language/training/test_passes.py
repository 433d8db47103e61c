"""Rows are divided into passes so that little padding is computed, and equally many on every process."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny_models import ENDS, apart, gradient, make_learner, make_policy, one_step

from tokenrl.core.estimator import Estimator
from tokenrl.language.training import passes, update
from tokenrl.language.training.passes import FIXED, ON_GPU, Lengths, equal_passes, fixed_cost


def planned(lengths, *, active=None, size=None, prompt=0, group=1, fixed=0, world=1, shared=False):
    """The passes of every process, as lists of rows; with `shared`, the blocks of passes."""
    lengths = torch.tensor(lengths)
    active = torch.ones(len(lengths), dtype=torch.bool) if active is None else torch.tensor(active).bool()
    found = []
    for index in range(world):
        accelerator = SimpleNamespace(num_processes=world, process_index=index)
        plan = equal_passes(accelerator, active, size, Lengths(lengths, prompt, group, fixed, shared))
        blocks = [[rows.tolist() for rows in block] for block in plan]
        assert shared or all(len(block) == 1 for block in blocks)
        found.append(blocks if shared else [block[0] for block in blocks])
    return found if world > 1 else found[0]


def cost(plan, lengths, *, prompt=0, group=1, fixed=0):
    return sum(
        len(rows) * max(lengths[i] for i in rows) + len({i // group for i in rows}) * prompt + fixed
        for rows in plan
    )


def test_rows_of_like_lengths_are_computed_together():
    assert planned([1, 9, 1, 9, 1, 9]) == [[1, 3, 5], [0, 2, 4]]  # the longest first
    assert planned([1, 9, 1, 9, 1, 9], fixed=30) == [
        [0, 1, 2, 3, 4, 5]
    ]  # 24 tokens are saved by a pass of 30
    assert planned([1, 9, 1, 9, 1, 9], fixed=20, group=2, prompt=5) == [[0, 1, 2, 3, 4, 5]]
    assert planned([1, 1, 1, 9, 9, 9], fixed=10, group=3, prompt=5) == [[3, 4, 5], [0, 1, 2]]
    assert planned([9, 9, 9, 9, 9, 8]) == [[0, 1, 2, 3, 4, 5]]  # too little padding to change anything
    assert planned([4]) == [[0]] and planned([4, 7], active=[0, 0]) == []


def test_a_limit_of_rows_is_kept():
    assert planned([5] * 7, size=3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert planned([9, 1] * 4, size=3) == [[4, 6], [0, 2], [5, 7], [1, 3]]
    assert planned([9, 1, 9, 1], active=[1, 1, 0, 1], size=2) == [[0], [1, 3]]


@pytest.mark.parametrize("fixed", [0, 3, 10])
@pytest.mark.parametrize("size", [None, 2, 4])
def test_the_plan_costs_least_of_all_cuts_between_lengths(fixed, size, monkeypatch):
    monkeypatch.setattr(passes, "LESS", 2.0)  # sorted in any case
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        lengths = torch.randint(1, 9, (9,), generator=generator).tolist()
        plan = planned(lengths, size=size, fixed=fixed)
        assert sorted(itertools.chain(*plan)) == list(range(9))
        assert all(len(rows) <= (size or 9) for rows in plan)
        unique = sorted(set(lengths))
        least = float("inf")
        for cuts in itertools.product([False, True], repeat=len(unique) - 1):
            ranges, top = [[unique[0]]], 0
            for length, cut in zip(unique[1:], cuts, strict=True):
                ranges = [*ranges, [length]] if cut else [*ranges[:-1], [*ranges[-1], length]]
            top = 0
            for one in ranges:
                count = sum(length in one for length in lengths)
                top += count * max(one) + -(-count // (size or 9)) * fixed
            least = min(least, top)
        found = cost(plan, lengths, fixed=fixed)
        assert found == least if size is None else found <= least  # parts of a range may have shorter ones


def test_no_plan_costs_more_than_rows_as_they_come():
    generator = torch.Generator().manual_seed(5)
    saved = 0
    for number in range(200):
        lengths = torch.randint(1, 40, (24,), generator=generator).tolist()
        options = {"prompt": 3 * (number % 5), "group": 4, "fixed": 10 * (number % 7)}
        size = (None, 4, 7)[number % 3]
        plan = planned(lengths, size=size, **options)
        assert sorted(itertools.chain(*plan)) == list(range(24))
        usual = [list(range(k, min(24, k + (size or 24)))) for k in range(0, 24, size or 24)]
        ratio = cost(plan, lengths, **options) / cost(usual, lengths, **options)
        assert plan == usual or ratio < 0.9
        saved += plan != usual
    assert 50 < saved < 200


def test_passes_of_a_block_share_their_prompts():
    halves = [[[2, 3], [0, 1]], [[6, 7], [4, 5]]]
    assert planned([5] * 8, group=4, size=2, prompt=20, shared=True) == halves
    as_they_come = [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]]
    assert planned([5] * 8, group=4, size=2, prompt=0, shared=True) == as_they_come
    assert planned([5] * 8, group=4, size=4, prompt=20, shared=True) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    # Of three prompts two fit into a pass of 10 rows.
    found = planned([5] * 12, group=4, size=10, prompt=50, shared=True)
    assert found == [[[0, 1, 2, 3, 4, 5, 6, 7]], [[8, 9, 10, 11]]]
    # Rows of like lengths, which do not pay with prompts of their own; but not where all fit into a pass.
    lengths, options = [9, 1, 9, 1], {"group": 4, "prompt": 30, "fixed": 4}
    assert planned(lengths, **options, size=3) == [[0, 1, 2], [3]]
    assert planned(lengths, **options, size=3, shared=True) == [[[0, 2], [1, 3]]]
    assert planned(lengths, **options, shared=True) == [[[0, 1, 2, 3]]]
    assert planned(lengths, active=[1, 0, 1, 0], **options, size=3, shared=True) == [[[0, 2]]]


def test_no_block_costs_more_or_has_more_prompts_than_a_pass_could():
    generator = torch.Generator().manual_seed(6)
    several = 0
    for number in range(200):
        lengths = torch.randint(1, 40, (24,), generator=generator).tolist()
        active = (torch.rand(24, generator=generator) < 0.8).tolist()
        options = {"prompt": 7 * (number % 5), "group": 4, "fixed": 10 * (number % 7)}
        size = (None, 3, 4, 7, 10)[number % 5]
        blocks = planned(lengths, active=active, size=size, **options, shared=True)
        rows = [row for block in blocks for rows in block for row in rows]
        assert sorted(rows) == [i for i, one in enumerate(active) if one]
        for block in blocks:
            assert all(len(rows) <= (size or 24) for rows in block)
            prompts = {row // 4 for rows in block for row in rows}
            assert len(block) == 1 or len(prompts) == 1 or sum(map(len, block)) <= (size or 24)
        alone = planned(lengths, active=active, size=size, **options)
        several += any(len(block) > 1 for block in blocks)
        shared = sum(
            cost(block, lengths, fixed=options["fixed"])
            + options["prompt"] * len({row // 4 for rows in block for row in rows})
            for block in blocks
        )
        assert shared <= cost(alone, lengths, **options)
    assert several > 50


def test_processes_make_equally_many_passes():
    lengths = [1, 9, 1, 9, 5, 5, 5, 5]
    first, second = planned(lengths, world=2)
    assert first == [[1, 3], [0, 2]] and second == [[0, 1, 2, 3], []]
    first, second = planned(lengths, world=2, active=[0, 0, 0, 0, 1, 1, 1, 1], size=2)
    assert first == [[], []] and second == [[0, 1], [2, 3]]


def tokens_of_completions(policy, *, prompts=False):
    """Tokens of each forward pass of completions that gradients flow through, padding too; or of prompts."""
    seen = []

    def note(_, arguments, options):
        ids = options.get("input_ids", arguments[0] if arguments else None)
        if torch.is_grad_enabled() and (options.get("past_key_values") is None) == prompts:
            seen.append(tuple(ids.shape))

    policy.model.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def learner_with(share, estimator="rloo", **options):
    """A learner whose passes share prompts or not, and the shapes of the prompts that it computes."""
    policy = make_policy("gpt2", dtype="float64", vocabulary=90)
    policy.eos_ids = ENDS
    policy.reference = make_policy("gpt2", dtype="float64", vocabulary=90, seed=1).model.requires_grad_(False)
    prompts = tokens_of_completions(policy, prompts=True)
    learner = make_learner(policy, estimator, max_completion_length=24, num_generations=6, **options)
    assert policy.share_passes
    policy.share_passes = share
    prompts.clear()
    return learner, prompts


@pytest.mark.parametrize(
    ("size", "estimator"), [(2, Estimator()), (3, Estimator.preset("grpo", beta=0.1)), (4, Estimator())]
)
def test_an_update_computes_each_prompt_once_and_finds_the_same_gradient(size, estimator, monkeypatch):
    monkeypatch.setattr(update, "fixed_cost", lambda *_: 0)
    found, counts = [], []
    for share in (False, True):
        learner, prompts = learner_with(share, estimator, micro_batch_size=size)
        one_step(learner)
        found.append(gradient(learner.policy.model))
        counts.append(sum(rows for rows, _ in prompts))
    assert counts[1] == 4 < counts[0] and apart(*found) < 1e-12 < 0.01 < found[0].norm()


def test_the_halves_of_a_measured_gradient_share_no_prompts():
    found = []
    for share in (False, True):
        learner, _ = learner_with(share, micro_batch_size=2, diagnostics_every=1)
        found.append(one_step(learner).metrics)
    assert found[0]["gradient/snr"] > 0 and found[0] == pytest.approx(found[1], rel=1e-9)


def test_an_update_computes_fewer_tokens_and_finds_the_same_gradient(monkeypatch):
    found, counts = [], []
    for fixed in (768, 0):
        monkeypatch.setattr(update, "fixed_cost", lambda *_, fixed=fixed: fixed)
        policy = make_policy("gpt2", dtype="float64", vocabulary=90)
        policy.eos_ids = ENDS
        seen = tokens_of_completions(policy)
        learner = make_learner(policy, "rloo", max_completion_length=24, num_generations=6)
        seen.clear()
        one_step(learner)
        found.append(gradient(policy.model))
        counts.append([rows * width for rows, width in seen])
    assert len(counts[0]) == 1 < len(counts[1])
    assert sum(counts[1]) < 0.8 * counts[0][0]
    assert found[0].norm() > 0.01 and apart(*found) < 1e-12


def test_a_pass_costs_more_tokens_where_a_token_takes_less_time():
    for dtype, costs in FIXED.items():
        assert [fixed_cost(n, dtype, "cpu") for n in (60_000, 999_999)] == [costs[0]] * 2
        assert [fixed_cost(n, dtype, "cpu") for n in (10**6, 10**7 - 1)] == [costs[1]] * 2
        assert fixed_cost(10**7, dtype, "cpu") == costs[2] < costs[1]
        assert fixed_cost(10**6, dtype, "cuda") == ON_GPU
    fewest, most = FIXED[torch.float32], FIXED[torch.bfloat16]
    assert all(few < many for few, many in zip(fewest, most, strict=True))
    assert fixed_cost(10**6, torch.float64, "cpu") == fewest[1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_update_reckons_with_the_precision_of_its_forward_passes(precision, monkeypatch):
    seen, usual = [], update.fixed_cost

    def recorded(*given):
        seen.append(given)
        return usual(*given)

    monkeypatch.setattr(update, "fixed_cost", recorded)
    policy = make_policy()
    one_step(make_learner(policy, mixed_precision=precision))
    assert set(seen) == {(policy.size, torch.bfloat16 if precision == "bf16" else torch.float32, "cpu")}
