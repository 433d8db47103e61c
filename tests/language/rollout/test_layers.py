"""Compiled layers give the log-probabilities and gradients that the model gives, or are left out."""

from __future__ import annotations

import contextlib
import functools

import pytest
import torch
from codes import stand_in
from families import FAMILIES, family_policy
from tiny_models import make_policy, quickly

from tokenrl.language.policy.lora import add_lora
from tokenrl.language.rollout import ahead
from tokenrl.language.rollout.layers import CompiledLayers
from tokenrl.language.rollout.scoring import score
from tokenrl.language.training.forward import make_up
from tokenrl.language.training.precision import with_eager_attention

NONE = {"mistral", "falcon_h1", "mamba2"}
"""Families whose layers all keep something else than keys and values of all tokens."""
SOME = {"gemma2", "gemma3", "gpt_oss", "lfm2", "qwen3_5", "qwen3_next", "granite_hybrid"}
"""Families of which one layer of two keeps them."""

LONG = {"falcon_h1", "qwen3_5", "qwen3_next"}
"""Families that take longest, of which the quick tests have relatives: lfm2 and mamba."""


def rollout_of(policy, *, rows=6, width=5, length=7, padded=True):
    rollout = make_up(policy, rows, 3, width, length)
    rollout.prompt_mask[0, : 2 if padded else 0] = False
    return rollout


def slopes(policy, rollout, layers=None, model=None, **options):
    """Log-probabilities, and the gradient of a weighted sum of them."""
    with contextlib.nullcontext() if layers is None else layers.inside():
        logprobs = score(model or policy.model, rollout, **options).logprobs
    weighted = (logprobs * torch.cos(torch.arange(logprobs.numel())).view_as(logprobs)).sum()
    found = torch.autograd.grad(weighted, policy.trainable_parameters(), materialize_grads=True)
    return logprobs.detach(), torch.cat([x.flatten() for x in found])


def assert_same(policy, layers, rollout, tolerance=1e-5, **options):
    found, expected = slopes(policy, rollout, layers, **options), slopes(policy, rollout, **options)
    torch.testing.assert_close(found[0], expected[0], atol=tolerance, rtol=0)
    assert (found[1] - expected[1]).norm() <= tolerance * expected[1].norm()
    return found


@pytest.fixture
def codes(monkeypatch):
    """All code that is made, none of which is compiled."""
    return stand_in(monkeypatch)


@pytest.mark.parametrize(
    "family", quickly(sorted(set(FAMILIES) - {"recurrent_gemma", "granite_hybrid", "mamba2"}), LONG)
)
def test_layers_of_every_family_may_be_computed_apart(family, codes):
    policy = family_policy(family)
    layers = CompiledLayers(policy.model)
    layers.making = True
    assert_same(policy, layers, rollout_of(policy), 0, share_prompt=family != "mamba")
    per_pass = 0 if family in NONE else 1 if family in SOME else 2
    assert sum(code.calls for code in codes) == (2 if family == "mamba" else 2 * per_pass)
    # One code for prompts and one for completions; but layers that are built differently share none.
    apart = 2 if family in ("smollm3", "deepseek_v3") else 1
    assert layers.made == len(codes) == (1 if family == "mamba" else 2 * apart * bool(per_pass))
    assert layers.failure == ""


def test_a_block_leaves_the_layers_as_they_were(codes):
    policy = make_policy()
    layers = CompiledLayers(policy.model)
    layers.making = True
    with pytest.raises(ZeroDivisionError), layers.inside():
        assert all("forward" in vars(layer) for layer in policy.model.model.layers)
        slopes(policy, rollout_of(policy))
        raise ZeroDivisionError
    assert codes and not any("forward" in vars(layer) for layer in policy.model.model.layers)


def test_nothing_is_made_unless_it_is_asked_for(codes, tmp_path):
    policy = make_policy()
    layers = CompiledLayers(policy.model, tmp_path)
    assert_same(policy, layers, rollout_of(policy), 0)
    assert codes == [] and len(set(layers.wanted.values())) == 2
    assert all(path.parent == tmp_path and not path.exists() for path in layers.wanted.values())
    layers.making = True
    assert_same(policy, layers, rollout_of(policy), 0)
    layers.making = False
    known = dict(layers.wanted)
    # One row or one token, and another mask, are other kinds.
    for options in ({"rows": 3, "padded": False}, {"length": 2}, {"width": 1, "padded": False}):
        assert_same(policy, layers, rollout_of(policy, **options), 0)
    assert len(codes) == 2 and layers.wanted == known
    calls = [code.calls for code in codes]
    assert_same(policy, layers, rollout_of(policy, rows=9, width=6, length=4), 0)
    assert [code.calls for code in codes] == [count + 2 for count in calls]


def test_nothing_is_made_without_a_gradient(codes):
    policy = make_policy()
    layers = CompiledLayers(policy.model)
    layers.making = True
    with torch.no_grad(), layers.inside():
        score(policy.model, rollout_of(policy))
    assert codes == []
    assert_same(policy, layers, rollout_of(policy), 0)
    before = [code.calls for code in codes]
    with torch.no_grad(), layers.inside():  # but it is used
        score(policy.model, rollout_of(policy))
    assert [code.calls for code in codes] == [2 + count for count in before] and len(codes) == 2


def test_code_that_does_not_hold_is_left(codes):
    policy = make_policy()
    layers = CompiledLayers(policy.model)
    layers.making = True
    assert_same(policy, layers, rollout_of(policy), 0)
    before = [code.calls for code in codes]
    for code in codes:
        code.fits = False
    assert_same(policy, layers, rollout_of(policy), 0)
    assert [code.calls for code in codes] == before


def test_a_compiler_that_fails_leaves_updates_as_they_are(monkeypatch):
    def fail(function, arguments):
        function(*arguments)
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(ahead, "compiled", fail)
    policy = make_policy()
    layers = CompiledLayers(policy.model)
    layers.making = True
    assert_same(policy, layers, rollout_of(policy), 0)
    assert layers.failure == "RuntimeError: no C++ compiler" and layers.made == 0
    with layers.inside():
        assert not any("forward" in vars(layer) for layer in policy.model.model.layers)


def test_layers_that_cannot_be_compiled_are_told():
    policy = make_policy()
    policy.model.model.layers[1].forward = lambda *_: None
    assert CompiledLayers(policy.model).failure == "something else has changed the layers"
    policy = make_policy()
    for layer in policy.model.model.layers:
        layer.gradient_checkpointing = True
    assert CompiledLayers(policy.model).failure == "activations are recomputed"
    assert CompiledLayers(torch.nn.Linear(2, 2)).failure == "the model names no layers"


def test_the_name_of_kept_code_says_how_layers_are_built(codes, tmp_path):
    paths = set()
    for policy in (
        *(make_policy(), make_policy(num_hidden_layers=1), make_policy(hidden_size=64)),
        *(make_policy(architecture="qwen2"), make_policy(dtype="bfloat16"), family_policy("smollm3")),
    ):
        layers = CompiledLayers(policy.model, tmp_path)
        slopes(policy, rollout_of(policy), layers)
        paths |= set(layers.wanted.values())
    # Of prompts and of completions; the number of layers is in the configuration, whatever it may decide.
    assert len(paths) == 2 * 7 and None not in paths


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A policy, the directory of the code of its layers, and that code, for padded prompts."""
    policy, directory = make_policy(), tmp_path_factory.mktemp("compiled")
    layers = CompiledLayers(policy.model, directory)
    layers.making = True
    slopes(policy, rollout_of(policy), layers)
    layers.making = False
    assert layers.failure == "" and layers.made == 2 == len(list(directory.glob("*.bin")))
    return policy, directory, layers


@pytest.fixture
def by_the_model(monkeypatch):
    """The layers that were computed as they are."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer as Layer

    calls, usual = [], Layer.forward

    @functools.wraps(usual)
    def counted(self, *given, **named):
        calls.append(self)
        return usual(self, *given, **named)

    monkeypatch.setattr(Layer, "forward", counted)
    return calls


@pytest.mark.slow
def test_code_gives_what_the_model_gives_on_other_sizes_and_weights(made, by_the_model):
    policy, _, layers = made
    for options in ({}, {"rows": 15, "length": 12}, {"rows": 9, "width": 8, "length": 3}):
        rollout = rollout_of(policy, **options)
        found, _ = assert_same(policy, layers, rollout)
        by_the_model.clear()
        with torch.no_grad():
            assert torch.equal(slopes_without_graph(policy, rollout, layers), found)
        assert by_the_model == []
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    other, _ = assert_same(policy, layers, rollout)
    assert not torch.equal(found, other)


def slopes_without_graph(policy, rollout, layers):
    with layers.inside():
        return score(policy.model, rollout).logprobs


@pytest.mark.slow
def test_as_many_rows_as_a_head_is_wide_are_no_fixed_size(request):
    policy = make_policy()
    width = policy.model.config.head_dim
    layers = CompiledLayers(policy.model)
    layers.making = True
    slopes(policy, rollout_of(policy, rows=width, padded=False), layers)
    layers.making = False
    assert layers.failure == "" and layers.made == 2
    by_the_model = request.getfixturevalue("by_the_model")  # once it is compiled
    for rows in (width, 2 * width - 1):
        slopes(policy, rollout_of(policy, rows=rows, length=width, padded=False), layers)
    assert by_the_model == []


@pytest.mark.slow
def test_kept_code_is_loaded_and_made_again_where_it_is_damaged(made, monkeypatch):
    policy, directory, _ = made
    monkeypatch.setattr(ahead, "compiled", None)  # cannot be called
    layers = CompiledLayers(policy.model, directory)
    layers.making = True
    assert_same(policy, layers, rollout_of(policy))
    assert layers.failure == "" and layers.made == 2
    for path in directory.glob("*.bin"):
        path.write_bytes(path.read_bytes()[:1000])
    again = CompiledLayers(policy.model, directory)
    again.making = True
    assert_same(policy, again, rollout_of(policy))
    assert again.failure == "TypeError: 'NoneType' object is not callable"


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "bloom", "smollm3", "gemma3", "lfm2"])
def test_families(family):
    policy = family_policy(family)
    layers = CompiledLayers(policy.model)
    layers.making = True
    assert_same(policy, layers, rollout_of(policy))
    assert layers.failure == "" and layers.made
    assert_same(policy, layers, rollout_of(policy, rows=9, width=6, length=9))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bfloat16", "lora"])
def test_precisions_and_adapters(how):
    policy = make_policy(dtype="bfloat16" if how == "bfloat16" else "float32")
    model = with_eager_attention(policy.model) if how == "bfloat16" else policy.model
    if how == "lora":
        add_lora(policy, r=2)
        model = policy.model
        with torch.no_grad():
            for p in policy.trainable_parameters():
                p.normal_(std=0.2)
    layers = CompiledLayers(model)
    layers.making = True
    assert_same(policy, layers, rollout_of(policy), 0.05 if how == "bfloat16" else 1e-5, model=model)
    assert layers.failure == "" and layers.made == 2
