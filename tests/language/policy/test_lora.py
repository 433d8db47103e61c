"""LoRA: what trains, what it is compared with, what is refused, and what the saved model is."""

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    make_learner,
    make_model,
    make_policy,
    make_task,
    make_tokenizer,
    one_step,
    weights,
)

import tokenrl
from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.language.policy.lora import add_lora
from tokenrl.language.policy.model import enable_gradient_checkpointing, load_policy
from tokenrl.language.policy.saving import save_policy

IDS = torch.tensor([[84, 56, 44, 39, 87], [5, 6, 7, 8, 9]])
ALL = [pytest.param(a, marks=() if a in ("llama", "gpt2") else pytest.mark.slow) for a in ARCHITECTURES]
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
def test_only_the_adapter_trains_its_reference_is_the_base_and_it_is_saved_merged(architecture, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = adapted(architecture)
    base, names = make_model(architecture), trained_names(policy)
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

    changed, adapter = logits(policy.model), weights(policy.model)
    assert not torch.allclose(changed, logits(base), atol=1e-3)
    save_policy(policy, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain, "peft_config")
    torch.testing.assert_close(logits(plain), changed, atol=1e-5, rtol=1e-5)
    assert policy.has_adapter and torch.equal(weights(policy.model), adapter)  # saving merged a copy


def test_the_kl_is_that_to_the_base():
    """With an adapter off as with a copy kept: the same weights give the same KL."""
    found = []
    for copied in (False, True):
        policy = adapted("gpt2", dtype="float64")
        policy.reference = make_model("gpt2", dtype="float64") if copied else None
        learner = make_learner(policy, Estimator(beta=0.1))
        one_step(learner)
        found.append(one_step(learner, step=2).metrics["kl"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_target_modules_are_adapted_and_no_others():
    names = trained_names(adapted(modules=["q_proj", "v_proj"]))
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("modules", [["query"], ["q_proj", "query"], ["mlp"], ["proj"]])
def test_target_modules_that_fit_nothing_are_refused(modules):
    policy = make_policy()
    with pytest.raises(Refused, match=f"{modules[-1]!r}.*linear layers are: .*q_proj"):
        add_lora(policy, r=2, target_modules=modules)
    assert not policy.has_adapter  # untouched
    with pytest.raises(Refused, match="lora_r=0"):
        add_lora(policy, r=0)


def test_the_seed_decides_the_adapter_and_nothing_else():
    state = torch.get_rng_state()
    first, same, other = make_policy(), make_policy(), make_policy()
    for policy, seed in ((first, 3), (same, 3), (other, 4)):
        add_lora(policy, r=2, seed=seed)
    assert torch.equal(weights(first.model), weights(same.model))
    assert not torch.equal(weights(first.model), weights(other.model))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_directory_with_an_adapter_loads_merged_or_apart_bit_for_bit(saved, tmp_path):
    policy = load_policy(saved("llama"))
    add_lora(policy, r=2)
    one_step(make_learner(policy))
    save_policy(policy, tmp_path)
    apart = load_policy(tmp_path / "adapter", merge_adapter=False)
    assert torch.equal(weights(apart.model), weights(policy.model))
    again = load_policy(tmp_path / "adapter")
    assert not again.has_adapter and len(again.trainable_parameters()) == len(list(again.model.parameters()))
    torch.testing.assert_close(logits(again.model), logits(policy.model), atol=1e-5, rtol=1e-5)
    add_lora(again, r=2)  # a second adapter: its reference is the model after the first
    with again.reference_model() as reference:
        torch.testing.assert_close(logits(reference), logits(policy.model), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_trains_the_same_adapter():
    plain, checkpointed = adapted("gpt2"), make_policy("gpt2")
    before = weights(plain.model)
    enable_gradient_checkpointing(checkpointed)
    add_lora(checkpointed, r=2)
    for policy in (plain, checkpointed):
        one_step(make_learner(policy, learning_rate=1e-3))
    torch.testing.assert_close(weights(checkpointed.model), weights(plain.model), atol=1e-5, rtol=1e-4)
    assert not torch.equal(weights(plain.model), before)


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


# ---- whole runs ----


def ends_early(completions, completion_ids, **_):
    return [float(len(ids) < 6) + 0.1 * len(set(ids)) for ids in completion_ids]


def train(directory, output, **options):
    prompts = ["the cat", "a", "count to ten one two", "sat on the", "dog", "on the log"]
    values = {"task": make_task(prompts, ends_early), "max_steps": 2, "learning_rate": 0.003, "cpu": True}
    values |= {"prompts_per_step": 3, "num_generations": 3, "eval_generations": 2, "quiet": True}
    return tokenrl.train(model=str(directory), output_dir=output, **(values | options))


@pytest.mark.parametrize("lora_r", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", ALL)
def test_a_trained_model_loads_in_plain_transformers(architecture, lora_r, saved, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = train(saved(architecture), tmp_path / "run", lora_r=lora_r, micro_batch_size=4)
    assert result.exit_code == 0 and result.steps == 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    base = AutoModelForCausalLM.from_pretrained(saved(architecture))
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        trained = result.policy.model.cpu()(ids).logits
        torch.testing.assert_close(model(ids).logits, trained, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3)
    text = tokenizer.decode(model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert text.startswith("the cat")


@pytest.mark.parametrize("lora_r", [0, 2])
def test_mixed_precision_keeps_what_is_trained_in_float32(lora_r, saved, tmp_path):
    how = {"gradient_checkpointing": True} if lora_r else {}
    result = train(saved("llama", "no_pad"), tmp_path / "run", mixed_precision="bf16", lora_r=lora_r, **how)
    assert result.steps == 2 and (tmp_path / "run" / "model" / "model.safetensors").exists()
    for p in result.policy.model.parameters():
        assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)


def test_a_training_prompt_too_long_is_refused_before_the_first_step(saved, tmp_path):
    task = make_task(["the cat", "a", "dog", "the cat " * 40], ends_early)
    task.eval_prompts = task.train_prompts[:2]
    with pytest.raises(Refused, match="row 3"):
        train(saved(), tmp_path / "run", task=task)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert train(saved(), tmp_path / "run", task=task, truncate_prompts=True).steps == 2
