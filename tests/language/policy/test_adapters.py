"""LoRA: what trains, what it is compared with, what is refused, and what the saved model is."""

import subprocess
import sys

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    make_learner,
    make_model,
    make_policy,
    make_tokenizer,
    one_step,
    weights,
)

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.language.policy.adapters import add_lora
from tokenrl.language.policy.checkpointing import enable_gradient_checkpointing
from tokenrl.language.policy.model import load_policy
from tokenrl.language.policy.saving import save_policy

IDS = torch.tensor([[84, 56, 44, 39, 87], [5, 6, 7, 8, 9]])


def adapted(architecture="llama", *, dtype="float32", modules=(), **options):
    policy = make_policy(architecture, dtype=dtype, **options)
    add_lora(policy, r=2, target_modules=modules)
    return policy


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_adapter_trains_and_its_reference_is_the_base(architecture):
    policy = adapted(architecture)
    base = make_model(architecture)
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    assert not any("lm_head" in name or "embed_out" in name for name in names)
    frozen = {n: p.clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    assert torch.equal(logits(policy.model), logits(base))

    learner = make_learner(policy, Estimator(beta=0.1))
    assert policy.reference is None  # no copy is kept
    before = weights(policy.model)
    first, second = one_step(learner), one_step(learner, step=2)
    assert first.metrics["kl"] == pytest.approx(0, abs=1e-6)
    assert abs(second.metrics["kl"]) > 1e-3
    assert not torch.equal(weights(policy.model), before)
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    with policy.reference_model() as reference:
        assert torch.equal(logits(reference), logits(base))
    assert not torch.allclose(logits(policy.model), logits(base))


def test_the_kl_is_that_to_the_base():
    """With an adapter off as with a copy kept: the same weights give the same KL."""
    policy = adapted("gpt2", dtype="float64")
    learner = make_learner(policy, Estimator(beta=0.1))
    one_step(learner)
    record = one_step(learner, step=2)
    copied = adapted("gpt2", dtype="float64")
    copied.reference = make_model("gpt2", dtype="float64")
    learner = make_learner(copied, Estimator(beta=0.1))
    one_step(learner)
    assert one_step(learner, step=2).metrics["kl"] == pytest.approx(record.metrics["kl"], rel=1e-9)


def test_target_modules_are_adapted_and_no_others():
    policy = adapted(modules=["q_proj", "v_proj"])
    names = {
        n.split(".lora_")[0].rsplit(".", 1)[-1] for n, p in policy.model.named_parameters() if p.requires_grad
    }
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize("modules", [["query"], ["q_proj", "query"], ["mlp"], ["proj"]])
def test_target_modules_that_fit_nothing_are_refused(modules):
    policy = make_policy()
    with pytest.raises(Refused, match=f"{modules[-1]!r}.*linear layers are: .*q_proj"):
        add_lora(policy, r=2, target_modules=modules)
    assert not policy.has_adapter  # untouched


def test_a_rank_below_one_is_refused():
    with pytest.raises(Refused, match="lora_r=0"):
        add_lora(make_policy(), r=0)


def test_the_seed_decides_the_adapter_and_nothing_else():
    state = torch.get_rng_state()
    first, same, other = make_policy(), make_policy(), make_policy()
    for policy, seed in ((first, 3), (same, 3), (other, 4)):
        add_lora(policy, r=2, seed=seed)
    assert torch.equal(weights(first.model), weights(same.model))
    assert not torch.equal(weights(first.model), weights(other.model))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_saved_model_is_the_adapted_one_in_plain_transformers(architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = adapted(architecture)
    one_step(make_learner(policy))
    adapter = {n: p.clone() for n, p in policy.model.named_parameters() if p.requires_grad}
    save_policy(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain, "peft_config")
    torch.testing.assert_close(logits(plain), logits(policy.model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits(plain), logits(make_model(architecture)), atol=1e-3)
    assert policy.has_adapter  # saving merged a copy
    assert all(torch.equal(p, adapter[n]) for n, p in policy.model.named_parameters() if n in adapter)


def test_a_directory_with_an_adapter_loads_merged(saved, tmp_path):
    policy = load_policy(saved("llama"))
    add_lora(policy, r=2)
    one_step(make_learner(policy))
    save_policy(policy, tmp_path)
    again = load_policy(tmp_path / "adapter")
    assert not again.has_adapter and len(again.trainable_parameters()) == len(list(again.model.parameters()))
    torch.testing.assert_close(logits(again.model), logits(policy.model), atol=1e-5, rtol=1e-5)
    add_lora(again, r=2)  # a second adapter: its reference is the model after the first
    with again.reference_model() as reference:
        torch.testing.assert_close(logits(reference), logits(policy.model), atol=1e-5, rtol=1e-5)


def test_the_saved_adapter_is_the_trained_one_bit_for_bit(saved, tmp_path):
    from peft import AutoPeftModelForCausalLM

    policy = load_policy(saved("llama"))
    add_lora(policy, r=2)
    one_step(make_learner(policy))
    save_policy(policy, tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", is_trainable=True)
    assert torch.equal(weights(loaded), weights(policy.model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_checkpointing_trains_the_same_adapter(architecture):
    plain = adapted(architecture)
    one_step(make_learner(plain, learning_rate=1e-3))
    checkpointed = make_policy(architecture)
    enable_gradient_checkpointing(checkpointed)
    add_lora(checkpointed, r=2)
    one_step(make_learner(checkpointed, learning_rate=1e-3))
    torch.testing.assert_close(weights(checkpointed.model), weights(plain.model), atol=1e-5, rtol=1e-4)
    assert not torch.equal(weights(plain.model), weights(adapted(architecture).model))


def test_an_adapter_on_bfloat16_weights_trains_in_float32(tmp_path):
    policy = adapted(dtype="bfloat16")
    assert {p.dtype for p in policy.trainable_parameters()} == {torch.float32}
    before = weights(policy.model)
    one_step(make_learner(policy))
    assert not torch.equal(weights(policy.model), before)
    save_policy(policy, tmp_path)
    assert load_policy(tmp_path, dtype="auto").trainable_parameters()[0].dtype == torch.bfloat16


def test_a_policy_object_gets_the_adapter_too():
    from tokenrl.language.training.setup import TrainArguments, make_policy as from_arguments

    given = make_policy()
    policy = from_arguments(TrainArguments(model=given, lora_r=2), None, print)
    assert policy is given and policy.has_adapter
    pair = (make_model(), make_tokenizer())
    assert from_arguments(TrainArguments(model=pair, lora_r=2), None, print).has_adapter


def test_adding_and_saving_an_adapter_warns_of_nothing(tmp_path, recwarn):
    policy = adapted()
    save_policy(policy, tmp_path)
    assert [str(w.message) for w in recwarn if w.category in (FutureWarning, DeprecationWarning)] == []
    checkpointed = make_policy()
    enable_gradient_checkpointing(checkpointed)
    assert not policy.model.is_gradient_checkpointing
    add_lora(checkpointed, r=2)
    assert checkpointed.model.is_gradient_checkpointing  # peft still learns what it asked for


@pytest.mark.slow  # two programs
def test_loading_an_adapter_warns_of_nothing(tmp_path):
    base = tmp_path / "base"
    save_policy(make_policy(), base)
    policy = load_policy(base)
    add_lora(policy, r=2)
    save_policy(policy, tmp_path / "model")
    code = (
        "from tokenrl.language.policy.adapters import load_adapted; "
        "from tokenrl.language.policy.model import load_policy; "
        "{}('{}', dtype='float32', trust_remote_code=False)"
    )
    for load in ("load_policy", "load_adapted"):  # afresh: transformers warns once a process
        run = [
            sys.executable,
            "-W",
            "error::FutureWarning",
            "-c",
            code.format(load, tmp_path / "model/adapter"),
        ]
        ran = subprocess.run(run, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-600:]
