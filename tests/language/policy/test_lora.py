"""LoRA: what trains, what it is compared with, what is refused, and what the saved model is."""

import pytest
import torch
from refusals import refused
from tiny_models import (
    ARCHITECTURES,
    apart,
    gradient,
    make_learner,
    make_model,
    make_policy,
    one_step,
    weights,
)
from torch.testing import assert_close

from tokenrl.core.estimator import Estimator
from tokenrl.language.policy.model import add_lora, enable_gradient_checkpointing
from tokenrl.language.policy.saving import save_policy

IDS = torch.tensor([[84, 56, 44, 39, 87], [5, 6, 7, 8, 9]])
ALL = [
    pytest.param(a, marks=() if a in ("llama", "gpt2") else pytest.mark.slow) for a in ARCHITECTURES
]
"""Quick: plain and transposed matrices."""


def adapted(architecture="llama", *, dtype="float32", modules=()):
    policy = make_policy(architecture, dtype=dtype)
    add_lora(policy, r=2, target_modules=modules)
    return policy


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def trained_names(policy):
    return [name for name, p in policy.model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("architecture", ALL)
def test_only_the_adapter_trains_its_reference_is_the_base_and_it_is_saved_merged(
    architecture, tmp_path
):
    from transformers import AutoModelForCausalLM

    policy = adapted(architecture)
    base = logits(make_model(architecture))
    names = trained_names(policy)
    assert names and all("lora_" in name for name in names)
    assert not any("lm_head" in name or "embed_out" in name for name in names)
    assert torch.equal(logits(policy.model), base)

    learner = make_learner(policy, Estimator(beta=0.1))
    assert policy.reference is None  # no copy is kept
    first = one_step(learner)
    second = one_step(learner, step=2)
    assert first.metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert abs(second.metrics["kl"]) > 1e-3
    changed = logits(policy.model)
    adapter = weights(policy.model)
    assert not torch.allclose(changed, base, atol=1e-3)
    with policy.reference_model() as reference:
        assert torch.equal(logits(reference), base)  # so no frozen weight has changed

    save_policy(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(logits(plain), changed, atol=1e-5, rtol=1e-5)
    # a copy was merged
    assert policy.has_adapter and torch.equal(weights(policy.model), adapter)


def test_target_modules_are_names_of_linear_layers():
    names = trained_names(adapted(modules=["q_proj", "v_proj"]))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == {"q_proj", "v_proj"}
    policy = make_policy()
    for wrong in ("query", "mlp", "proj"):
        with refused(f"{wrong!r}.*linear layers are: .*q_proj"):
            add_lora(policy, r=2, target_modules=["q_proj", wrong])
    assert not policy.has_adapter  # untouched


def test_gradient_checkpointing_trains_the_same_adapter():
    gradients = []
    for is_checkpointed in (False, True):
        policy = make_policy("gpt2")
        if is_checkpointed:
            enable_gradient_checkpointing(policy)
        add_lora(policy, r=2)
        one_step(make_learner(policy, learning_rate=1e-3))
        gradients.append(gradient(policy.model))
    assert apart(*gradients) < 1e-4
