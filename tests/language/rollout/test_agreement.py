"""Models that are made wrong on purpose are refused, or scored in a plainer way, under every option."""

from types import SimpleNamespace

import pytest
import torch
from families import family_policy
from refusals import refused
from tiny_models import (
    ARCHITECTURES,
    make_policy,
    make_task,
    quickly,
)
from transformers.cache_utils import DynamicLayer

import tokenrl
from tokenrl.language.policy.model import add_lora, enable_gradient_checkpointing
from tokenrl.language.rollout.agreement import check_model
from tokenrl.language.rollout.cache import Memory
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.scoring import Regime


def usual(regime: Regime) -> bool:
    """Whether nothing is done in a plainer way."""
    return regime.share_prompt and regime.tokens_at_once and not regime.remarks


def changed(policy, change):
    """Pass the keywords of each forward pass through `change`, and its output through what that returns."""
    original = policy.model.forward

    def forward(*arguments, **options):
        after = change(options) or (lambda out: out)
        return after(original(*arguments, **options))

    policy.model.forward = forward
    return policy


def without(*names):
    return lambda options: [options.pop(name, None) for name in names] and None


def cache_of(options):
    """The cache that a forward pass is given; transformers calls it `cache` from 5.24 on."""
    return options.get("cache") or options.get("past_key_values")


def detached(options):
    """Cut the gradient's path through the cache, as an update in `no_grad` would."""
    cache = cache_of(options)
    if cache is not None and torch.is_grad_enabled():
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()


def overwritten(options):
    """Write over the cache in place after it was read, as a recurrent state may be."""
    cache = cache_of(options)

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


@pytest.mark.parametrize("dtype", quickly(["float32", "bfloat16"], {"float32"}))
@pytest.mark.parametrize("spread", quickly([0.25, 0.02], {0.02}))
@pytest.mark.parametrize("architecture", quickly(ARCHITECTURES, {"qwen2", "gpt_neox"}))
def test_right_models_pass_and_those_without_mask_or_cache_do_not(architecture, spread, dtype):
    options = {"dtype": dtype, "initializer_range": spread}
    check_model(make_policy(architecture, **options))
    absolute = [("position_ids",)] if architecture == "gpt2" else []
    for names in (
        ("attention_mask",),
        ("attention_mask", "position_ids"),
        ("past_key_values", "cache"),
        *absolute,
    ):
        wrong = changed(make_policy(architecture, **options), without(*names))
        with refused(r"tiny .* sampling gives log-probabilities that are off by"):
            check_model(wrong)


def test_a_gradient_that_does_not_pass_the_cache_means_no_sharing():
    policy = changed(make_policy(), detached)
    regime = check_model(policy)
    assert not regime.share_prompt
    assert "shared prompt gives a gradient that is off" in regime.remarks["prompts"]


def test_a_cache_that_is_overwritten_is_shared_only_where_no_gradient_is_needed():
    policy = changed(make_policy("gpt2"), overwritten)
    assert usual(check_model(policy, gradient=False))
    regime = check_model(policy)
    assert not regime.share_prompt and "modified by an" in regime.remarks["prompts"]


def test_a_wrong_gradient_is_refused():
    with refused("scoring gives a gradient that is off by"):
        check_model(changed(make_policy(), steep_when_padded))
    check_model(changed(make_policy(), steep_when_padded), gradient=False)


def test_wrong_hidden_states_are_refused_where_a_critic_reads_them():
    check_model(changed(make_policy(), hidden_of_the_first_layer))
    with refused("sampling gives hidden states that are off by"):
        check_model(changed(make_policy(), hidden_of_the_first_layer), hidden=True)


@pytest.mark.parametrize("context", [2, 3, 5, 8, None])
def test_the_probe_fits_into_any_context(context):
    policy = make_policy("gpt2", n_positions=context or 64)
    policy.context = context
    assert usual(check_model(policy))


@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_with_an_adapter(family):
    policy = family_policy(family)
    add_lora(policy, r=2)
    assert usual(check_model(policy, hidden=True))


def test_under_activation_checkpointing_nothing_is_shared_and_nothing_is_remarked():
    policy = make_policy()
    enable_gradient_checkpointing(policy)
    regime = check_model(policy)
    assert (
        not regime.share_prompt
        and not regime.remarks
        and any(m.training for m in policy.model.modules())
    )


def broken(*_, **__):
    raise AttributeError("no such attribute in this release")


def negative(layer, keys, values, *_, **__):
    """Return other keys than those that were given, as a layer does whose meaning a release has changed."""
    keys, values = original_update(layer, keys, values)
    return -keys, values


def bare(layer, keys, values):
    """Begin a layer without the attributes that transformers 5.24 took away."""
    original_start(layer, keys, values)
    for name in ("dtype", "device"):
        vars(layer).pop(name, None)


original_update = Memory.update
original_start = DynamicLayer.lazy_initialization
LIBRARY = {
    "the layer's type": ("tokenrl.language.rollout.cache.DynamicLayer", type("Other", (), {})),
    "a layer's update": ("tokenrl.language.rollout.cache.Memory.update", negative),
    "the choice of rows": ("transformers.cache_utils.Cache.reorder_cache", broken),
    "the rows of a layer": ("transformers.cache_utils.DynamicLayer.reorder_cache", broken),
    "attributes of a layer": ("transformers.cache_utils.DynamicLayer.lazy_initialization", bare),
    "the layers": ("tokenrl.language.rollout.cache.Cache.make_room", broken),
}


@pytest.mark.parametrize("release", LIBRARY)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_where_a_release_lacks_what_the_fast_way_reads_the_plain_way_samples_the_same(
    release, kind, monkeypatch
):
    policy = make_policy(kind)
    prompts, draws = [[5, 6, 7], [8]], torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    before = TransformersGenerator(policy).generate(prompts, Sampling(12, 3), draws)
    monkeypatch.setattr(*LIBRARY[release], raising=False)
    regime = check_model(policy)
    plain = release not in ("the layer's type", "attributes of a layer")
    assert regime.plain_cache == plain == ("cache" in regime.remarks)
    after = TransformersGenerator(policy, regime=regime).generate(prompts, Sampling(12, 3), draws)
    assert torch.equal(before.completion_ids, after.completion_ids)
    assert torch.allclose(before.logprobs, after.logprobs, atol=1e-5)


def test_a_run_without_our_cache_trains_and_its_header_says_so(tmp_path, monkeypatch, said):
    monkeypatch.setattr("tokenrl.language.rollout.cache.Memory.update", broken)
    result = tokenrl.train(
        model=make_policy(),
        task=make_task(),
        output_dir=tmp_path / "run",
        max_steps=2,
        eval_generations=1,
        cpu=True,
    )
    assert result.exit_code == 0
    header = said()
    assert "as the model keeps it" in header and "no such attribute in this release" in header


@pytest.mark.parametrize("worst", ["nothing", "refused", "prompts", "cache"])
def test_processes_score_in_the_plainest_way_that_one_of_them_needs(worst):
    sent = []

    def gather(faults):
        sent.append(faults[0].tolist())
        other = [int(worst == name) for name in ("refused", "prompts", "logits", "cache")]
        return torch.tensor([faults[0].tolist(), other]).int()

    processes = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    policy = make_policy()
    if worst == "refused":
        with refused("another process"):
            check_model(policy, accelerator=processes)
    else:
        regime = check_model(policy, accelerator=processes)
        assert regime.share_prompt == (worst != "prompts")
        assert regime.plain_cache == (worst == "cache")
        assert {*regime.remarks} == {worst} - {"nothing"}
    assert sent == [[0, 0, 0, 0]]
    with refused("off by"):  # a process that refuses tells the others first
        check_model(changed(make_policy(), without("attention_mask")), accelerator=processes)
    assert sent[1:] == [[1, 0, 0, 0]]


def test_a_run_refuses_a_wrong_model(tmp_path):
    policy = changed(make_policy(), without("attention_mask"))
    with refused("attention_mask"):
        tokenrl.train(
            model=policy, task=make_task(), output_dir=tmp_path / "run", cpu=True, quiet=True
        )
