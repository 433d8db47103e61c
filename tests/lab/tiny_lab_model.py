"""A transformer of four tokens and a reward for each of its completions."""

from __future__ import annotations

import math

import torch

from tokenrl.language.policy.model import Policy, wrap

PROMPTS = [[1], [2, 3]]
WORDS = ["a", "b c"]


def tiny_policy(
    architecture: str = "gpt2", *, seed: int = 0, spread: float = 0.5, layers: int = 2
) -> Policy:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    common = {"vocab_size": 4, "eos_token_id": 0, "bos_token_id": 0, "initializer_range": spread}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if architecture == "gpt2":
            shape = {"n_positions": 8, "n_embd": 8, "n_layer": layers, "n_head": 2}
            model = GPT2LMHeadModel(GPT2Config(**common, **shape))
        else:
            shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
            model = LlamaForCausalLM(LlamaConfig(**common, **shape, num_attention_heads=2))
    return wrap(model.double(), tokenizer, source="tiny")


def points_of(prompt: int, ids: list[int]) -> float:
    return math.sin(
        3 * prompt + sum((place + 1) * token for place, token in enumerate(ids))
    ) + 0.4 * len(ids)


def points(prompts, completion_ids, **_) -> list[float]:
    return [points_of(WORDS.index(p), ids) for p, ids in zip(prompts, completion_ids, strict=True)]
