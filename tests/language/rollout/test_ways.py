"""The probe refuses models that are made wrong on purpose, and finds the same way under every option."""

from types import SimpleNamespace

import pytest
import torch
from families import family_policy
from tiny_models import ARCHITECTURES, make_policy, make_task, make_tokenizer, quickly

import tokenrl
from tokenrl.errors import Refused
from tokenrl.language.policy.lora import add_lora
from tokenrl.language.policy.model import enable_gradient_checkpointing
from tokenrl.language.rollout.prompts import SharedPrompts
from tokenrl.language.rollout.ways import choose_way


def changed(policy, change):
    """Pass the keywords of each forward pass through `change`, and its output through what that returns."""
    original = policy.model.forward

    def forward(*given, **options):
        after = change(options) or (lambda out: out)
        return after(original(*given, **options))

    policy.model.forward = forward
    return policy


def without(*names):
    return lambda options: [options.pop(name, None) for name in names] and None


def detached(options):
    """Cut the gradient's path through the cache, as an update in `no_grad` would."""
    cache = options.get("past_key_values")
    if cache is not None and torch.is_grad_enabled():
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def overwritten(options):
    """Write over the cache in place after it was read, as a recurrent state may be."""
    cache = options.get("past_key_values")

    def write(out):
        if cache is not None:
            for layer in cache.layers:
                layer.keys.add_(0.0)
        return out

    return write


def steep_when_padded(options):
    """Right values and a wrong gradient, wherever there is a mask."""
    if options.get("attention_mask") is None:
        return None

    def double(out):
        out.logits = 2 * out.logits - out.logits.detach()
        return out

    return double


def hidden_of_the_first_layer(options):
    if not options.get("use_cache"):
        return None

    def swap(out):
        if out.hidden_states is not None:
            out["hidden_states"] = (out.hidden_states[0],)
        return out

    return swap


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("spread", [0.25, pytest.param(0.02, marks=pytest.mark.slow)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_right_models_pass_and_those_without_mask_or_cache_do_not(architecture, spread, dtype):
    options = {"dtype": dtype, "initializer_range": spread}
    choose_way(make_policy(architecture, **options))
    for names in (("attention_mask",), ("attention_mask", "position_ids"), ("past_key_values",)):
        wrong = changed(make_policy(architecture, **options), without(*names))
        with pytest.raises(Refused, match=r"tiny .* sampling gives log-probabilities that are off by"):
            choose_way(wrong)


def test_absolute_positions_must_be_heeded():
    with pytest.raises(Refused, match="sampling gives"):
        choose_way(changed(make_policy("gpt2"), without("position_ids")))


def test_a_gradient_that_does_not_pass_the_cache_means_no_sharing():
    policy = changed(make_policy(), detached)
    choose_way(policy)
    assert (
        not policy.share_prompt and "shared prompt gives a gradient that is off" in policy.remarks["prompts"]
    )


def test_a_cache_that_is_overwritten_is_shared_only_where_no_gradient_is_needed():
    policy = changed(make_policy("gpt2"), overwritten)
    choose_way(policy, gradient=False)
    assert policy.share_prompt and not policy.remarks
    choose_way(policy)
    assert not policy.share_prompt and "modified by an" in policy.remarks["prompts"]


def test_prompts_are_not_shared_between_passes_where_that_is_wrong(monkeypatch):
    policy = make_policy()
    marks = [torch.full_like(p, 7.0) for p in policy.trainable_parameters()]
    for p, mark in zip(policy.trainable_parameters(), marks, strict=True):
        p.grad = mark
    for options in ({}, {"gradient": False, "passes": True}):
        choose_way(policy, **options)
        assert not policy.share_passes
    choose_way(policy, passes=True)
    assert policy.share_passes
    monkeypatch.setattr(SharedPrompts, "backward", lambda _: None)
    choose_way(policy, passes=True)
    assert not policy.share_passes and policy.share_prompt and not policy.remarks
    assert all(p.grad is mark for p, mark in zip(policy.trainable_parameters(), marks, strict=True))
    assert all(bool((mark == 7).all()) for mark in marks)


def test_a_wrong_gradient_is_refused():
    with pytest.raises(Refused, match="scoring gives a gradient that is off by"):
        choose_way(changed(make_policy(), steep_when_padded))
    choose_way(changed(make_policy(), steep_when_padded), gradient=False)


def test_wrong_hidden_states_are_refused_where_a_critic_reads_them():
    choose_way(changed(make_policy(), hidden_of_the_first_layer))
    with pytest.raises(Refused, match="sampling gives hidden states that are off by"):
        choose_way(changed(make_policy(), hidden_of_the_first_layer), hidden=True)


def test_a_model_with_nan_weights_is_left_to_the_run():
    policy = make_policy()
    policy.trainable_parameters()[0].data.fill_(float("nan"))
    choose_way(policy)
    assert policy.share_prompt


@pytest.mark.parametrize("context", [2, 3, 5, 8, None])
def test_the_probe_fits_into_any_context(context):
    policy = make_policy("gpt2", n_positions=context or 64)
    policy.context = context
    choose_way(policy)
    assert policy.share_prompt and not policy.remarks


@pytest.mark.parametrize("family", ["llama", "lfm2", "qwen3_5"])
def test_with_an_adapter(family):
    policy = family_policy(family)
    add_lora(policy, r=2)
    choose_way(policy, hidden=True)
    assert policy.share_prompt and not policy.remarks


def test_under_activation_checkpointing_nothing_is_shared_and_nothing_is_remarked():
    policy = make_policy()
    enable_gradient_checkpointing(policy)
    choose_way(policy)
    assert not policy.share_prompt and not policy.remarks and policy.model.training


@pytest.mark.parametrize("worst", [0, 1, 2])
def test_processes_take_the_slowest_way_that_one_of_them_needs(worst):
    seen = []

    def gather(failed):
        seen.append([*map(bool, failed[0])])
        return torch.tensor([failed[0].tolist(), [worst == 2, worst == 1, False]]).int()

    other = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    policy = make_policy()
    if worst == 2:
        with pytest.raises(Refused, match="another process"):
            choose_way(policy, accelerator=other)
    else:
        choose_way(policy, accelerator=other)
        assert policy.share_prompt == (worst == 0) == (not policy.remarks)
    assert seen == [[False, False, False]]
    with pytest.raises(Refused, match="off by"):  # a process that refuses tells the others first
        choose_way(changed(make_policy(), without("attention_mask")), accelerator=other)
    assert seen[1:] == [[True, False, False]]


TRAINED = ["lfm2", "granite_hybrid", "falcon_h1", "mamba", "qwen3_5"]


@pytest.mark.parametrize("family", quickly(TRAINED, {"granite_hybrid", "falcon_h1", "qwen3_5"}))
def test_two_updates(family, tmp_path, capsys):
    policy = family_policy(family, vocabulary=96)
    before = [p.detach().clone() for p in policy.trainable_parameters()]
    result = tokenrl.train(
        model=(policy.model, make_tokenizer()),
        task=make_task(),
        output_dir=tmp_path / "run",
        max_steps=2,
        prompts_per_step=3,
        num_generations=3,
        max_completion_length=4,
        estimator="ppo" if family == "lfm2" else "rloo",
        eval_generations=1,
        learning_rate=0.01,
        cpu=True,
    )
    assert result.exit_code == 0 and result.steps == 2
    after = result.policy.trainable_parameters()
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    said = "computed anew for each completion" in " ".join(capsys.readouterr().out.split())
    assert said == (not result.policy.share_prompt) == (family == "mamba")


def test_a_run_refuses_a_wrong_model(tmp_path):
    policy = changed(make_policy(), without("attention_mask"))
    with pytest.raises(Refused, match="attention_mask"):
        tokenrl.train(model=policy, task=make_task(), output_dir=tmp_path / "run", cpu=True, quiet=True)
