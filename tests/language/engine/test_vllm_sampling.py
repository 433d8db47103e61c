"""What vLLM samples is what the policy says: distribution, seeds, ends; and nothing else is disturbed."""

from __future__ import annotations

import random
import signal

import numpy as np
import pytest
import torch
from engines import IDS, gap, sampled, scaled, started, wide_policy
from refusals import stopped
from scipy.stats import chisquare
from tiny_models import make_tokenizer

from tokenrl.language.policy.stops import StopStrings
from tokenrl.language.rollout import vllm
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling

pytestmark = pytest.mark.vllm
DISTRIBUTIONS = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"temperature": 2.0},
]


@pytest.fixture(scope="module")
def engine():
    """One engine for tests that stand together: another one, once it is closed, ends this one's groups."""
    policy = wide_policy(max_position_embeddings=512)  # a block of the cache has 128 tokens
    # so that the engine knows the tokenizer
    policy.stops = StopStrings(make_tokenizer(), ["<pad>"])
    with started(policy) as engine:
        yield engine


def alone(engine, rollout, row, distribution):
    """The policy's log-probabilities [T, V] of a row, in a forward pass of its own."""
    row = rollout.take(torch.tensor([row]))
    ids = torch.cat([row.prompt_ids, row.completion_ids], 1)
    with torch.no_grad():
        logits = engine.policy.model(ids).logits[:, row.prompt_ids.shape[1] - 1 : -1]
    return distribution.log_probabilities(logits)[0]


@pytest.mark.parametrize("vocabulary", [13, 90, 96])
def test_tokens_are_drawn_from_the_distribution_of_the_policy(vocabulary):
    """The engine pads the vocabulary to 64s; a row beyond it would soon be drawn at a high temperature."""
    with started(wide_policy(vocabulary=vocabulary)) as engine:
        for settings in DISTRIBUTIONS:
            distribution = Sampling(1, **settings)
            assert gap(engine, sampled(engine, [[3, 7, 4]], **settings), distribution) < 1e-4
            many = sampled(
                engine, [[3, 7, 4]], num_generations=3000, max_completion_length=1, **settings
            )
            counts = torch.bincount(many.completion_ids[:, 0], minlength=vocabulary)
            p = alone(engine, many, 0, distribution)[0].double().exp()
            assert len(counts) == vocabulary and not counts[p == 0].any()
            rare = p < 5 / 3000  # their sum is one class
            observed = [*counts[~rare].tolist(), int(counts[rare].sum())]
            expected = [*p[~rare].tolist(), float(p[rare].sum()) + 1e-12]
            assert chisquare(observed, 3000 * np.array(expected) / sum(expected)).pvalue > 1e-3, (
                settings
            )


def test_a_turn_reads_what_is_new_alone_until_the_weights_change(engine, monkeypatch):
    """Whole blocks of its cache are reused, and none of other weights."""
    generate = engine.engine.generate
    reused = []

    def counted(*arguments, **options):
        answers = generate(*arguments, **options)
        reused.extend(answer.num_cached_tokens for answer in answers)
        return answers

    monkeypatch.setattr(engine.engine, "generate", counted)
    sampling = Sampling(20)
    draws = torch.full((1, 20), 0.5)
    engine.sync(engine.policy)
    history = [3 + number % 80 for number in range(300)]
    turn = engine.generate([history], sampling, draws)
    history += [*turn.completion_ids[0][turn.mask[0]].tolist(), 5, 6]
    engine.generate([history], sampling, draws)
    engine.sync(engine.policy)
    engine.generate([history], sampling, draws)
    assert reused == [0, 256, 0]


def test_rows_follow_from_seed_stream_and_step(engine):
    rows = sampled(engine)
    assert torch.equal(sampled(engine).completion_ids, rows.completion_ids)
    assert len(torch.unique(rows.completion_ids[:4], dim=0)) == 4
    for other in ({"seed": 1}, {"step": 2}, {"stream": "evaluation"}):
        assert not torch.equal(
            sampled(engine, **other).completion_ids[:, :3], rows.completion_ids[:, :3]
        )
    greedy = {"num_generations": 0, "max_completion_length": 20}
    usual = sampled(TransformersGenerator(engine.policy), **greedy)
    assert torch.equal(sampled(engine, **greedy).completion_ids, usual.completion_ids)
    assert sampled(engine, **greedy).sampling_logprobs.shape == usual.sampling_logprobs.shape


def test_weights_reach_the_engine_and_what_was_computed_with_others_is_dropped(engine):
    """Prompts and completions of the old weights are in the cache when the same are sampled again."""
    policy, settings = engine.policy, {"prompts": [*IDS, 100 * [3, 4], 100 * [3, 4] + [5]]}
    before = sampled(engine, **settings)
    for _ in range(20):
        engine.sync(policy)
        again = sampled(engine, **settings)
    assert torch.equal(again.completion_ids, before.completion_ids)
    assert torch.allclose(again.sampling_logprobs, before.sampling_logprobs, atol=1e-6, rtol=0)
    scaled(policy, 1.5)
    engine.sync(policy)
    after = sampled(engine, **settings)
    scaled(policy, 1 / 1.5)
    moved = gap(engine, after)
    scaled(policy, 1.5)
    assert gap(engine, after) < 1e-4 < 0.1 < moved
    scaled(policy, 1 / 1.5)
    engine.sync(policy)
    assert gap(engine, sampled(engine, **settings)) < 1e-4


@pytest.mark.parametrize("layer", ["embed_tokens", "q_proj", "down_proj", "lm_head", "model.norm"])
def test_an_update_that_scales_one_matrix_is_refused_at_the_start(monkeypatch, layer):
    right = vllm.checkpoint_weights

    def wrong(model):
        return {name: w * (1.3 if layer in name else 1.0) for name, w in right(model).items()}

    monkeypatch.setattr(vllm, "checkpoint_weights", wrong)
    with stopped("differ from the trainer's by"), started(wide_policy()):
        pass


def test_rows_that_wait_for_room_or_lose_theirs_are_right():
    """Of 64 rows of 200 tokens a cache of 1 MiB holds few at once, and some lose their place."""
    policy = wide_policy(max_position_embeddings=512)
    with started(policy, cache=0.002) as engine:
        rows = sampled(engine, num_generations=20, max_completion_length=200)
        assert rows.mask.shape == (60, 200) and gap(engine, rows) < 1e-3


def test_random_states_threads_and_signals_are_as_they_were():
    def state():
        handlers = [
            signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
        ]
        threads = torch.get_num_threads(), torch.set_num_threads
        return (
            torch.get_rng_state().tolist(),
            str(np.random.get_state()),
            random.getstate(),
            threads,
            handlers,
        )

    before, policy = state(), wide_policy()
    assert state() == before
    for _ in range(2):  # a second engine after the first was closed
        with started(policy) as engine:
            assert state() == before
            assert gap(engine, sampled(engine)) < 1e-4 and state() == before
            engine.sync(policy)
            assert state() == before
        assert state() == before
