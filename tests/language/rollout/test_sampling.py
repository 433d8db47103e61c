"""Sampling: the frequencies are the model's probabilities, and a completion depends on nothing else."""

import copy
import itertools
from collections import Counter
from itertools import chain

import pytest
import torch
from refusals import stopped
from scipy.stats import chisquare
from tiny_models import (
    ARCHITECTURES,
    ENDS,
    PROMPTS,
    completions,
    make_model,
    make_policy,
    textbook_logprobs,
)
from torch.testing import assert_close

from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.language.rollout.scoring import score


def tiny(eos=(0,), vocabulary=4, **options) -> Policy:
    """A policy without a tokenizer, of few enough sequences to enumerate."""
    model = make_model(vocabulary=vocabulary, bos_token_id=None, eos_token_id=None, **options)
    return Policy(model=model, tokenizer=None, eos_ids=eos, pad_id=0, context=None)


def draw(policy, prompts, *, generations=4, length=6, seed=1, **how):
    how |= {"num_generations": generations, "max_completion_length": length, "seed": seed}
    return completions(policy, prompts, **how)


def greedy(policy, prompts, length=6, **how):
    return completions(policy, prompts, num_generations=0, max_completion_length=length, **how)


def texts(rollout):
    pairs = zip(rollout.completion_ids, rollout.mask, strict=True)
    return [tuple(ids[keep].tolist()) for ids, keep in pairs]


def sequences(vocabulary, length, eos):
    """All completions of up to `length` tokens that end with their first EOS or at the length."""
    for n in range(1, length + 1):
        for head in itertools.product([i for i in range(vocabulary) if i not in eos], repeat=n - 1):
            yield from ((*head, last) for last in range(vocabulary) if n == length or last in eos)


@torch.no_grad()
@pytest.mark.parametrize("distribution", [{"temperature": 0.7}, {"top_k": 3, "top_p": 0.9}])
@pytest.mark.parametrize("eos", [(0, 2), ()])
def test_frequencies_are_the_exact_probabilities(eos, distribution):
    """A right sampler fails here with one seed of 1,000, and the seed is fixed."""
    policy = tiny(eos, initializer_range=0.15)
    exact = copy.deepcopy(policy.model).double()
    prompts = [[1, 2, 3, 1, 2], [3]]
    n = 5_000
    sampled = texts(draw(policy, prompts, generations=n, length=3, seed=7, **distribution))
    for prompt, rows in zip(prompts, (sampled[:n], sampled[n:]), strict=True):
        probabilities = {}
        for sequence in sequences(4, 3, eos):
            logits = exact(torch.tensor([[*prompt, *sequence]])).logits[0, len(prompt) - 1 : -1]
            logp = textbook_logprobs(logits, **distribution)
            probabilities[sequence] = float(logp[range(len(sequence)), sequence].sum().exp())
        assert sum(probabilities.values()) == pytest.approx(1)
        assert ("top_k" in distribution) == (0 in probabilities.values())
        counts = Counter(rows)
        assert counts.keys() <= {sequence for sequence, p in probabilities.items() if p > 0}
        frequent = [sequence for sequence, p in probabilities.items() if n * p >= 5]
        assert len(frequent) > 6
        observed = [counts[sequence] for sequence in frequent]
        expected = [n * probabilities[sequence] for sequence in frequent]
        observed.append(n - sum(observed) + 1e-9)  # all rare ones
        expected.append(n - sum(expected) + 1e-9)
        assert chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "distribution", [{}, {"temperature": 0.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02}]
)
def test_logprobs_and_entropy_are_those_of_the_distribution_sampled_from(
    architecture, distribution
):
    policy = make_policy(architecture)
    policy.eos_ids = ENDS
    prompts = [policy.encode(p) for p in PROMPTS]
    rollout = draw(policy, prompts, **distribution)
    assert texts(greedy(policy, prompts, **distribution)) == texts(greedy(policy, prompts))
    assert len(set(rollout.mask.sum(dim=1).tolist())) > 2  # rows really finish at different times
    with torch.no_grad():
        scores = score(
            policy.model, rollout, distribution=Distribution(**distribution), entropy=True
        )
    for mine, other in ((rollout.logprobs, scores.logprobs), (rollout.entropy, scores.entropy)):
        assert_close(
            mine[rollout.mask], other.detach()[rollout.mask], atol=1e-5, rtol=0, check_dtype=False
        )
        assert not mine[~rollout.mask].any()


def test_masks_end_with_the_first_of_several_eos():
    policy = make_policy()
    policy.eos_ids = ENDS
    rollout = draw(policy, [policy.encode(p) for p in PROMPTS], generations=8)
    is_end = torch.isin(rollout.completion_ids, torch.tensor(ENDS)) & rollout.mask
    lengths = rollout.mask.sum(dim=1)
    width = rollout.mask.shape[1]
    assert torch.equal(rollout.mask, torch.arange(width) < lengths[:, None])
    ended = is_end[range(len(lengths)), lengths - 1]
    assert torch.equal(is_end.sum(dim=1), ended.long())
    assert torch.equal(rollout.truncated, ~ended) and (ended | (lengths == 6)).all()
    assert (rollout.completion_ids[~rollout.mask] == policy.pad_id).all()
    assert len(rollout.completion_ids[is_end].unique()) > 2


@pytest.mark.parametrize(("eos", "width"), [((), 5), ((0, 1, 2, 3), 1)])
def test_no_eos_runs_to_the_length_and_an_immediate_one_is_one_action(eos, width):
    rollout = draw(tiny(eos=eos), [[1], [2, 3]], length=5)
    assert rollout.mask.all() and rollout.mask.shape == (8, width)
    assert rollout.truncated.tolist() == [not eos] * 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_same_completions_whatever_else_is_in_the_batch(architecture):
    policy = make_policy(architecture)
    policy.eos_ids = ENDS
    prompts = [policy.encode(p) for p in PROMPTS]
    alone = [texts(draw(policy, [ids], places=[i])) for i, ids in enumerate(prompts)]
    assert len(set(chain(*alone))) > 12
    for order in ([0, 1, 2, 3], [3, 0, 2]):
        together = texts(draw(policy, [prompts[i] for i in order], places=order))
        assert together == [*chain(*(alone[i] for i in order))]


@pytest.mark.parametrize("rows_at_once", [1, 8])
@pytest.mark.parametrize("generations", [4, 0])
def test_same_completions_however_many_are_sampled_at_once(rows_at_once, generations):
    policy = make_policy()
    policy.eos_ids = ENDS
    prompts = [policy.encode(p) for p in PROMPTS]
    sampling = Sampling(6, generations, seed=1, step=1, keep_score_norms=True, keep_hidden=True)
    draws = uniforms("training", sampling, range(4))
    whole = TransformersGenerator(policy).generate(prompts, sampling, draws)
    parts = TransformersGenerator(policy, rows_at_once=rows_at_once).generate(
        prompts, sampling, draws
    )
    assert texts(parts) == texts(whole)
    assert torch.equal(parts.prompt_ids[parts.prompt_mask], whole.prompt_ids[whole.prompt_mask])
    for name, column in whole.columns().items():
        if not name.endswith("_ids"):  # whose padding differs
            assert_close(getattr(parts, name), column, atol=1e-5, rtol=0)


@pytest.mark.parametrize("several_eos", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_that_of_transformers(architecture, several_eos):
    policy = make_policy(architecture)
    policy.eos_ids = ENDS if several_eos else (1,)
    prompts = [policy.encode(p) for p in PROMPTS]
    rollout = greedy(policy, prompts, length=8)
    padded = policy.model.generate(
        rollout.prompt_ids,
        attention_mask=rollout.prompt_mask.long(),
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.pad_id,
    )
    assert torch.equal(padded[:, rollout.prompt_ids.shape[1] :], rollout.completion_ids)
    assert not (several_eos and rollout.mask.all())


def test_uniforms_depend_on_seed_step_prompt_generation_and_position_only():
    def table(seed=3, step=5, prompts=(0, 1, 7), generations=4, length=6):
        sampling = Sampling(length, generations, seed=seed, step=step)
        return uniforms("training", sampling, prompts).view(len(prompts), generations, length)

    base = table()
    assert base.dtype == torch.float64 and base.min() >= 0 and base.max() < 1
    assert base.unique().numel() == base.numel()
    assert torch.equal(table(prompts=(7, 0)), base[[2, 0]])
    assert torch.equal(table(generations=9)[:, :4], base)
    assert torch.equal(table(length=11)[:, :, :6], base)
    assert torch.equal(table(length=5), base[:, :, :5])
    for other in (table(seed=4), table(step=6), table(prompts=(2, 3, 8))):
        assert not (other == base).any()
    assert not (table(seed=5, step=3) == base).any()


def test_nan_logits_stop():
    policy = tiny()
    with torch.no_grad():
        policy.model.lm_head.weight[2, 0] = float("nan")
    for generate in (lambda: draw(policy, [[1]]), lambda: greedy(policy, [[1]])):
        with stopped("not finite"):
            generate()


def test_sampling_leaves_the_mode_of_the_model_alone():
    policy = tiny()
    for training in (True, False):
        policy.model.train(training)
        draw(policy, [[1]])
        assert policy.model.training is training
