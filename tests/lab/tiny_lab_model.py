"""A transformer of four tokens and a reward for each of its completions."""

from __future__ import annotations

import math

import torch

from tokenrl.language.policy.model import Policy, wrap

PROMPTS = [[1], [2, 3]]
WORDS = ["a", "b c"]


def tiny_policy(*, seed: int = 0, layers: int = 2) -> Policy:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    shape = {"n_positions": 8, "n_embd": 8, "n_layer": layers, "n_head": 2, "vocab_size": 4}
    shape |= {"eos_token_id": 0, "bos_token_id": 0, "initializer_range": 0.5}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**shape))
    return wrap(model.double(), tokenizer, source="tiny")


def points_of(prompt: int, ids: list[int]) -> float:
    return math.sin(
        3 * prompt + sum((place + 1) * token for place, token in enumerate(ids))
    ) + 0.4 * len(ids)


def points(prompts, completion_ids, **_) -> list[float]:
    return [points_of(WORDS.index(p), ids) for p, ids in zip(prompts, completion_ids, strict=True)]
