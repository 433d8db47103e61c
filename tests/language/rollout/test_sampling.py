"""Sampling: the frequencies are the model's probabilities, and a completion depends on nothing else."""

import copy
import itertools
from collections import Counter

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

from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.sampling import Sampling, uniforms


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
        expected = {}
        for sequence in sequences(4, 3, eos):
            logits = exact(torch.tensor([[*prompt, *sequence]])).logits[0, len(prompt) - 1 : -1]
            logp = textbook_logprobs(logits, **distribution)
            expected[sequence] = n * float(logp[range(len(sequence)), sequence].sum().exp())
        assert sum(expected.values()) == pytest.approx(n)
        assert ("top_k" in distribution) == (0 in expected.values())
        counts = Counter(rows)
        assert counts.keys() <= {sequence for sequence, count in expected.items() if count > 0}
        frequent = [sequence for sequence, count in expected.items() if count >= 5]
        assert len(frequent) > 6
        pairs = [(counts[sequence], expected[sequence]) for sequence in frequent]
        seen, right = map(sum, zip(*pairs, strict=True))
        pairs.append((n - seen + 1e-9, n - right + 1e-9))  # all rare ones
        assert chisquare(*zip(*pairs, strict=True)).pvalue > 1e-3


@pytest.mark.parametrize("eos", [ENDS, (1,)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_that_of_transformers_and_masks_end_with_the_first_eos(architecture, eos):
    policy = make_policy(architecture)
    policy.eos_ids = eos
    prompts = [policy.encode(p) for p in PROMPTS]
    rollout = greedy(policy, prompts, length=8)
    options = {"eos_token_id": list(eos), "pad_token_id": policy.pad_id, "max_new_tokens": 8}
    padded = policy.model.generate(
        rollout.prompt_ids,
        attention_mask=rollout.prompt_mask.long(),
        do_sample=False,
        **options,
    )
    assert torch.equal(padded[:, rollout.prompt_ids.shape[1] :], rollout.completion_ids)
    for masked in (rollout, draw(policy, prompts, generations=8)):
        is_end = torch.isin(masked.completion_ids, torch.tensor(eos)) & masked.mask
        assert torch.equal(masked.mask, is_end.cumsum(1) - is_end.long() == 0)
        assert torch.equal(masked.truncated, ~is_end.any(dim=1))
        assert eos == (1,) or not masked.mask.all()


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
    others = [{"seed": 4}, {"step": 6}, {"prompts": (2, 3, 8)}, {"seed": 5, "step": 3}]
    assert not any((table(**other) == base).any() for other in others)


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
