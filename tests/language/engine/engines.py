"""Tiny policies whose heads are as wide as vLLM's kernels for CPUs want them, and engines of them."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from families import family_policy
from tiny_models import PROMPTS, make_task, make_tokenizer

import tokenrl
from tokenrl.language.policy.model import Policy, wrap
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.language.rollout.scoring import UNCHANGED, USUAL, Regime, score, with_missing_fields
from tokenrl.language.rollout.vllm import VllmGenerator
from tokenrl.language.training.engines import start_engine

GROUPED = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
SHAPES = {"gpt2": {"hidden_size": 64, "n_embd": 64, "n_head": 2}}
IDS = [[5, 9, 13, 21, 33, 40], [40, 7], [3]]
"""Prompts of unequal lengths."""


def wide_policy(
    family: str = "llama", *, kind: str = "pad", vocabulary: int = 96, **options
) -> Policy:
    """A random policy with heads of 32 numbers, and a tokenizer of at most 90 ids."""
    options = SHAPES.get(family, GROUPED) | {"initializer_range": 0.1} | options
    model = family_policy(family, vocabulary=vocabulary, **options).model
    if vocabulary < 90:
        return Policy(
            model=model, tokenizer=None, eos_ids=(), pad_id=0, context=None, source=family
        )
    return wrap(model, make_tokenizer(kind), source=family)


@contextlib.contextmanager
def started(policy: Policy, rows_at_once: int | None = None, *, cache: float = 0.05):
    """An engine whose first completions agree with the trainer."""
    make = partial(VllmGenerator.start, cache=cache)
    with contextlib.closing(start_engine(make, policy, Regime(), rows_at_once)) as engine:
        vocabulary = policy.model.config.get_text_config().vocab_size
        rows = sampled(engine, [[token % vocabulary for token in ids] for ids in IDS])
        sampling = Sampling(8, 4)
        engine.check(with_missing_fields(policy, rows, USUAL, sampling), sampling)
        yield engine.engine


def sampled(engine, prompts=IDS, *, stream: str = "training", **settings) -> Rollout:
    """Completions of step 1; 8 tokens and 4 rows of a prompt unless the settings say otherwise."""
    sampling = Sampling(**{"max_completion_length": 8, "num_generations": 4, "step": 1} | settings)
    return engine.generate(prompts, sampling, uniforms(stream, sampling, range(len(prompts))))


def gap(engine, rollout: Rollout, distribution: Distribution = UNCHANGED) -> float:
    """The largest difference between the log-probabilities of an engine and those of its policy's model."""
    with torch.no_grad():
        ours = score(engine.policy.model, rollout, distribution=distribution).logprobs
    return float((ours - rollout.sampling_logprobs)[rollout.mask].abs().max())


def scaled(policy: Policy, factor: float) -> None:
    """Change all weights."""
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(factor)


def uneven(completion_ids, **_):
    """Rewards that nothing learns to make equal, so that each step has a gradient."""
    return [sum(ids) * 7919 % 101 / 101 for ids in completion_ids]


def trained(folder, policy, *, reward=uneven, **options):
    """A quick run that vLLM samples for."""
    task = make_task([f"{a} {b}" for a in PROMPTS for b in PROMPTS], reward)
    shape = {"max_steps": 3, "prompts_per_step": 4, "num_generations": 4, "learning_rate": 1e-2}
    shape |= {
        "generator": "vllm",
        "generator_cache": 0.05,
        "cpu": True,
        "quiet": True,
        "eval_generations": 2,
    }
    return tokenrl.train(**{"model": policy, "task": task, "output_dir": folder} | shape | options)
