"""What vLLM cannot sample is refused in one paragraph of words."""

from __future__ import annotations

import gc

import pytest
from engines import gap, sampled, started, trained, wide_policy
from refusals import refused
from tiny_models import make_task

from tokenrl.errors import TokenrlError
from tokenrl.language.rollout.vllm import VllmGenerator

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("llama", {"dtype": "float64"}, "float64"),
        ("llama", {"head_dim": 8}, "head_dim=8"),
        (
            "mixtral",
            {"num_local_experts": 4},
            "from the trainer's|new weights",
        ),  # a reload spoils experts
        ("smollm3", {}, "vLLM cannot sample from 'smollm3', a SmolLM3ForCausalLM"),
    ],
)
def test_a_model_that_the_engine_cannot_sample_is_refused_and_the_next_is_not(
    family, config, words
):
    with pytest.raises(TokenrlError, match=words) as caught, started(wide_policy(family, **config)):
        pass
    with started(wide_policy()) as engine:
        del caught  # and with it what is left of the first engine
        gc.collect()
        assert gap(engine, sampled(engine)) < 1e-4


def test_a_custom_architecture_is_refused():
    policy = wide_policy()
    policy.model.__class__ = type("OwnForCausalLM", (type(policy.model),), {})
    with refused(r"OwnForCausalLM.*generator transformers samples without it"):
        VllmGenerator.start(policy, cache=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"generator_cache": 1e-6}, "vLLM cannot sample"),
        ({"temperature": 2.5}, "temperature was given as 2.5; vllm samples from 0.01 to 2"),
        ({"top_p": 0.5, "min_p": 0.1}, "give top_p or min_p, not both"),
    ],
)
def test_settings_that_the_engine_cannot_keep_are_refused(tmp_path, options, words):
    with refused(words):
        trained(tmp_path / "run", wide_policy(), **options)


@pytest.mark.parametrize(("words", "length"), [(400, 8), (1, 1500)])
def test_rows_longer_than_the_cache_holds_are_refused_before_the_first_step(
    tmp_path, words, length
):
    """The engine would end such completions early, and say nothing."""
    policy = wide_policy(max_position_embeddings=4096)
    options = {"task": make_task(["the cat " * words] * 8), "max_completion_length": length}
    with refused(r"up to \d+ tokens, and generator_cache has room for \d+: raise it"):
        trained(tmp_path / "run", policy, generator_cache=3e-4, **options)
