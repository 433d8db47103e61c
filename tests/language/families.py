"""Tiny random models of many architectures; families that the installed transformers lacks are skipped."""

from __future__ import annotations

import pytest
import torch

from tokenrl.language.policy.model import Policy

PLAIN = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = PLAIN | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 3}
EXPERTS = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}
STATES = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("Llama", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "smollm3": ("SmolLM3", GROUPED | {"no_rope_layers": [1, 0]}),
    "gpt2": ("GPT2", {"n_layer": 2, "n_head": 4, "n_embd": 32}),
    "opt": ("OPT", PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("Bloom", {"n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", PLAIN | {"alibi": True}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 3}),
    "mixtral": ("Mixtral", EXPERTS),
    "gemma2": ("Gemma2", GEMMA | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3", GEMMA | {"layer_types": ["sliding_attention", "full_attention"]}),
    "gpt_oss": ("GptOss", EXPERTS | {"head_dim": 8, "sliding_window": 3}),
    "deepseek_v3": (
        "DeepseekV3",
        PLAIN
        | {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
        | {
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
        }
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    ),
    "olmo2": ("Olmo2", GROUPED),
    "lfm2": ("Lfm2", GROUPED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "qwen3_5": ("Qwen3_5", GROUPED | LINEAR),
    "qwen3_next": (
        "Qwen3Next",
        GROUPED
        | LINEAR
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        | {"shared_expert_intermediate_size": 16},
    ),
    "granite_hybrid": (
        "GraniteMoeHybrid",
        EXPERTS | STATES | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    ),
    "falcon_h1": ("FalconH1", GROUPED | STATES | {"mamba_d_ssm": 64}),
    "mamba": ("Mamba", {"num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "Mamba2",
        {"num_hidden_layers": 2, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2},
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        PLAIN
        | {"block_types": ["recurrent", "attention"], "attention_window_size": 8, "lru_width": 32},
    ),
}
"""Prefix of the class names in transformers, and the settings of a tiny model, by family."""


def family_policy(
    family: str, *, dtype: str = "float32", seed: int = 0, vocabulary: int = 64, **config
) -> Policy:
    """A random policy of one family, without EOS: 2 layers x 32, or as its configuration is changed."""
    import transformers

    prefix, settings = FAMILIES[family]
    names = [f"{prefix}TextConfig", f"{prefix}Config"]
    config_class = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    classes = [f"{prefix}ForCausalLM", f"{prefix}LMHeadModel"]
    model_class = next(
        (getattr(transformers, n) for n in classes if hasattr(transformers, n)), None
    )
    if config_class is None or model_class is None:
        pytest.skip(f"the installed transformers has no {prefix}")
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "initializer_range": 0.25,
        "max_position_embeddings": 64,
    }
    special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**(sizes | special | settings | config)))
    model = model.to(getattr(torch, dtype))
    return Policy(
        model=model.eval(), tokenizer=None, eos_ids=(), pad_id=0, context=None, source=family
    )
