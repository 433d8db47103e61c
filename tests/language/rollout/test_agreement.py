"""Models that are made wrong on purpose are refused, or scored in a plainer way, under every option."""

from types import SimpleNamespace

import pytest
import torch
from families import family_policy
from refusals import refused
from tiny_models import letters_trained, make_policy, make_task
from transformers.cache_utils import DynamicLayer

from tokenrl.core import Estimator
from tokenrl.language.policy.model import add_lora
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


@pytest.mark.parametrize(
    ("architecture", "spread", "dtype"),
    [("llama", 0.25, "bfloat16"), ("gpt2", 0.25, "bfloat16"), ("gpt_neox", 0.02, "float32")],
)
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


@pytest.mark.parametrize(
    ("architecture", "change", "remark"),
    [
        ("llama", detached, "shared prompt gives a gradient that is off"),
        ("gpt2", overwritten, "modified by an"),
    ],
)
def test_a_gradient_that_does_not_pass_the_cache_means_no_sharing(architecture, change, remark):
    policy = changed(make_policy(architecture), change)
    assert usual(check_model(policy, gradient=False))
    regime = check_model(policy)
    assert not regime.share_prompt and remark in regime.remarks["prompts"]


@pytest.mark.parametrize(
    ("change", "needs", "words"),
    [
        (steep_when_padded, {}, "scoring gives a gradient that is off by"),
        (
            hidden_of_the_first_layer,
            {"hidden": True},
            "sampling gives hidden states that are off by",
        ),
    ],
)
def test_wrong_gradients_and_hidden_states_are_refused_where_they_are_needed(change, needs, words):
    policy = changed(make_policy(), change)
    check_model(policy, gradient=False)
    with refused(words):
        check_model(policy, **needs)


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


def half(totals, **_):
    return torch.full_like(totals, 0.5)


def test_a_run_without_our_cache_trains_and_its_header_says_so_and_names_its_function(
    tmp_path, monkeypatch, said
):
    monkeypatch.setattr("tokenrl.language.rollout.cache.Memory.update", broken)
    options = {"estimator": Estimator(baseline=half), "eval_generations": 1, "quiet": False}
    run = letters_trained(tmp_path / "run", make_task(), model=make_policy(), **options)
    assert run.exit_code == 0
    header = said()
    assert "as the model keeps it" in header and "no such attribute in this release" in header
    assert "baseline half" in header and "bias: unknown" in header and "<function" not in header


@pytest.mark.parametrize("worst", ["nothing", "refused", "prompts", "cache"])
def test_processes_score_in_the_plainest_way_that_one_of_them_needs(worst):
    """A process that refuses tells the others first."""
    sent = []

    def gather(faults):
        sent.append(faults[0].tolist())
        other = [int(worst == name) for name in ("refused", "prompts", "logits", "cache")]
        return torch.tensor([sent[-1], other]).int()

    processes = SimpleNamespace(num_processes=2, device="cpu", gather=gather)
    if worst == "refused":
        with refused("another process"):
            check_model(make_policy(), accelerator=processes)
    else:
        regime = check_model(make_policy(), accelerator=processes)
        plain = {"prompts": not regime.share_prompt, "cache": regime.plain_cache}
        assert {name for name, is_plain in plain.items() if is_plain} == {worst} - {"nothing"}
        assert {*regime.remarks} == {worst} - {"nothing"}
    with refused("off by"):
        check_model(changed(make_policy(), without("attention_mask")), accelerator=processes)
    assert sent == [[0, 0, 0, 0], [1, 0, 0, 0]]
