"""Sampling by compiled code gives what the model gives, on any sizes, or says why it is left out."""

from __future__ import annotations

import os

import pytest
import torch
from codes import stand_in
from families import FAMILIES, GROWING, family_policy
from tiny_models import make_policy

from tokenrl.language.policy.lora import add_lora
from tokenrl.language.rollout import ahead, compiled
from tokenrl.language.rollout.compiled import CompiledStep
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.layer_steps import layer_step
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.runs.threads import using_threads

PADDED = [[5, 9, 13, 21, 33], [40, 7], [3, 4, 5]]
EVEN = [[5, 9, 13], [40, 7, 8], [3, 4, 5]]
ENDS = tuple(range(0, 64, 7))


def a_step(directory=None):
    """A step that makes code where it is missing."""
    step = CompiledStep(directory)
    step.making = True
    return step


def sampled(policy, step=None, prompts=PADDED, length=8, group=3):
    draws = torch.rand(len(prompts) * group, length, generator=torch.Generator().manual_seed(1))
    return TransformersGenerator(policy, step=step).generate(prompts, Sampling(length, group), draws)


def assert_same(policy, step, tolerance=2e-5, **options):
    """Sample both ways, and return the completions."""
    found, expected = sampled(policy, step, **options), sampled(policy, **options)
    assert torch.equal(found.completion_ids, expected.completion_ids)
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=tolerance, rtol=0)
    return found


@pytest.fixture
def by_the_model(monkeypatch):
    """The number of rows of each call that the model itself has answered for the step."""
    calls, usual = [], compiled.logits_after

    def counted(model, token, arguments):
        calls.append(len(token))
        return usual(model, token, arguments)

    monkeypatch.setattr(compiled, "logits_after", counted)
    return calls


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A policy, the directory of its compiled code, and the step that made it, for padded prompts."""
    policy = make_policy(num_hidden_layers=1)
    policy.eos_ids = ENDS
    directory = tmp_path_factory.mktemp("compiled")
    step = a_step(directory)
    sampled(policy, step)
    assert step.failure == "" and step.seconds > 0 and len(list(directory.glob("*.bin"))) == 1
    return policy, directory, step


@pytest.mark.slow
def test_code_gives_what_the_model_gives_on_other_sizes_and_weights(made, by_the_model):
    policy, _, step = made
    for options in ({}, {"length": 14, "group": 5}, {"prompts": [[1] * 9, [2, 3, 4]], "group": 2}):
        assert_same(policy, step, **options)
    assert not [n for n in by_the_model if n > 1]  # those of a single row are left to the model
    with using_threads(1 + torch.get_num_threads() % 2):  # the code is for any number
        rollout = assert_same(policy, step, length=14, group=5)
    assert len(set(rollout.mask.sum(1).tolist())) > 3  # rows left the batch
    before = [p.clone() for p in policy.model.parameters()]
    with torch.no_grad():
        for p in policy.model.parameters():
            p.mul_(1.1)
    other = assert_same(policy, step, length=14, group=5)
    assert not torch.equal(other.completion_ids, rollout.completion_ids)
    with torch.no_grad():
        for p, old in zip(policy.model.parameters(), before, strict=True):
            p.copy_(old)


@pytest.mark.slow
def test_kept_code_is_loaded_and_made_again_where_it_is_damaged(made, by_the_model, monkeypatch, tmp_path):
    policy, directory, _ = made
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # as after a restart
    step = a_step(directory)
    monkeypatch.setattr(ahead, "compiled", None)  # cannot be called
    assert_same(policy, step)
    assert step.failure == "" and len([n for n in by_the_model if n > 1]) == 1  # what it is compared with
    assert list(tmp_path.iterdir()) == [] and os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
    (path,) = directory.glob("*.bin")
    path.write_bytes(path.read_bytes()[:1000])
    again = a_step(directory)
    assert_same(policy, again)
    assert again.failure == "TypeError: 'NoneType' object is not callable"


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("adapted", [False, True])
def test_of_a_deep_model_one_layer_is_compiled(architecture, adapted, by_the_model, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "DEEP", 0)
    policy = make_policy(architecture, **({"num_hidden_layers": 3} if architecture == "llama" else {}))
    policy.eos_ids = ENDS
    if adapted:
        add_lora(policy, r=2)
        with torch.no_grad():
            for p in policy.trainable_parameters():
                p.normal_(std=0.2)
    assert_same(policy, a_step(tmp_path))
    assert len(list(tmp_path.glob("*.bin"))) == 1
    monkeypatch.setattr(ahead, "compiled", None)  # cannot be called
    step, answered = a_step(tmp_path), len(by_the_model)
    assert_same(policy, step)
    assert step.failure == "" and "forward" not in vars(compiled.compiled_part(policy.model))
    for options in ({"length": 14, "group": 5}, {"prompts": [[1] * 9, [2, 3, 4]], "group": 2}):
        assert_same(policy, step, **options)
    assert len(by_the_model) > answered  # which calls the code of the layers


@pytest.mark.parametrize("deep", [False, True])
def test_code_that_is_missing_is_known_before_it_is_made(deep, monkeypatch, tmp_path):
    made = stand_in(monkeypatch)
    if deep:
        monkeypatch.setattr(compiled, "DEEP", 0)
    policy, step = make_policy(), CompiledStep(tmp_path)
    expected = sampled(policy)
    assert torch.equal(sampled(policy, step).logprobs, expected.logprobs)
    assert made == [] and list(tmp_path.iterdir()) == [] and step.seconds == 0
    padded = dict(step.wanted)
    sampled(policy, step, prompts=EVEN)
    assert len(padded) == 1 and len(step.wanted) == 2 == len(set(step.wanted.values()))
    step.making = True
    sampled(policy, step)
    assert set(tmp_path.glob("*.bin")) == set(padded.values()) and len(made) == 1
    assert step.failure == "" and len(step.wanted) == 2


def test_code_of_a_layer_serves_all_that_are_built_alike(monkeypatch):
    made = stand_in(monkeypatch)
    monkeypatch.setattr(compiled, "DEEP", 0)
    policy, step = make_policy(num_hidden_layers=3), a_step()
    found, expected = sampled(policy, step), sampled(policy)
    assert step.failure == "" and torch.equal(found.logprobs, expected.logprobs)
    (code,) = made
    layers = list(policy.model.model.layers)
    assert code.example is layers[0] and code.modules == layers * 7


def test_code_that_fails_in_the_middle_of_the_layers_leaves_the_sampling_as_it_is(monkeypatch):
    class Half:
        guard_check, disable_guard_check = staticmethod(lambda *_: True), staticmethod(lambda: None)

        def __call__(self, module, arguments, name, held):
            if module is policy.model.model.layers[1]:
                raise RuntimeError("no")
            return layer_step(module, arguments, name, held)

    monkeypatch.setattr(compiled, "DEEP", 0)
    monkeypatch.setattr(ahead, "compiled", lambda *_: Half())
    policy, step = make_policy(num_hidden_layers=3), a_step()
    found, expected = sampled(policy, step), sampled(policy)
    assert step.failure == "RuntimeError: no" and torch.equal(found.logprobs, expected.logprobs)
    assert not any("forward" in vars(layer) for layer in policy.model.model.layers)


@pytest.mark.parametrize("deep", [True, False])
def test_what_is_compiled_and_how_many_modules_it_has(deep, monkeypatch):
    model = make_policy(num_hidden_layers=2).model
    if deep:
        monkeypatch.setattr(compiled, "DEEP", compiled.weighted(model))
    part = compiled.compiled_part(model)
    assert part is (model.model.layers[0] if deep else model)
    assert compiled.weighted(part) == (9 if deep else 21)  # 7 products and 2 norms
    model.model.layers[1].gradient_checkpointing = True
    assert compiled.compiled_part(model) is model


def test_libraries_are_kept_beside_the_code_that_loads_them(tmp_path, monkeypatch):
    seen = []

    def made(*_):
        seen.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return Wrong(0.0)

    elsewhere = str(tmp_path / "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", elsewhere)
    monkeypatch.setattr(ahead, "compiled", made)
    for directory in (tmp_path, None):
        sampled(make_policy(), a_step(directory))
    assert seen == [str(tmp_path / "kernels"), elsewhere]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == elsewhere


def test_the_name_of_kept_code_says_what_it_depends_on(tmp_path, monkeypatch):
    policy, step = make_policy(num_hidden_layers=1), a_step(tmp_path)
    paths = {step._path(policy.model, padded=padded) for padded in (True, False)}
    paths |= {step._path(make_policy(**options).model, padded=True) for options in ({"hidden_size": 64},)}
    for change in ({"dtype": "bfloat16"}, {"architecture": "qwen2"}):
        paths.add(step._path(make_policy(**change).model, padded=True))
    with using_threads(torch.get_num_threads() + 1):  # the code is for any number
        assert step._path(policy.model, padded=True) in paths
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(ahead.os, "cpu_count", lambda: 77)
        paths.add(step._path(policy.model, padded=True))
    adapted = make_policy()
    add_lora(adapted, r=2)
    paths.add(step._path(adapted.model, padded=True))
    assert len(paths) == 7 and None not in paths
    alike = make_policy(num_hidden_layers=1, seed=5).model
    assert step._path(alike, padded=True) in paths  # the weights do not matter
    stranger = make_policy().model
    stranger.__class__ = type("Own", (type(stranger),), {"__module__": "somewhere"})
    assert step._path(stranger, padded=True) is None
    assert a_step()._path(policy.model, padded=True) is None


class Wrong:
    """Code whose logits are those of the model, and a little more."""

    def __init__(self, off):
        self.off = off

    def guard_check(self, *_):
        return True

    def disable_guard_check(self):
        pass

    def __call__(self, model, token, arguments):
        logits = compiled.logits_after(model, token, arguments)
        return logits + self.off * logits.std() * torch.eye(1, logits.shape[1])


@pytest.mark.parametrize(("off", "wrong"), [(0.0, False), (5e-4, False), (2e-3, True), (torch.nan, True)])
def test_wrong_code_is_not_taken(off, wrong, monkeypatch):
    monkeypatch.setattr(ahead, "compiled", lambda *_: Wrong(off))
    policy, step = make_policy(), a_step()
    rollout, expected = sampled(policy, step), sampled(policy)
    assert bool(step.failure) == wrong
    if wrong:
        assert "off by" in step.failure
        assert torch.equal(rollout.completion_ids, expected.completion_ids)
        assert torch.equal(rollout.logprobs, expected.logprobs)


def test_a_compiler_that_fails_leaves_the_sampling_as_it_is(monkeypatch):
    def fail(function, arguments):
        function(*arguments)
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(ahead, "compiled", fail)
    policy, step = make_policy(), a_step()
    assert torch.equal(sampled(policy, step).logprobs, sampled(policy).logprobs)
    assert step.failure == "RuntimeError: no C++ compiler"


@pytest.mark.parametrize("family", ["gemma3", "mistral", "mamba", "falcon_h1"])
def test_other_memories_are_left_to_the_model(family):
    policy, step = family_policy(family), a_step()
    assert torch.equal(sampled(policy, step).logprobs, sampled(policy).logprobs)
    assert "something else than keys and values" in step.failure


def test_hidden_states_come_from_the_model():
    policy, step = make_policy(), a_step()
    draws = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    generator = TransformersGenerator(policy, step=step)
    rollout = generator.generate([[1, 2]], Sampling(4, 2, keep_hidden=True), draws)
    assert rollout.hidden is not None and step.seconds == 0


@pytest.mark.slow
@pytest.mark.parametrize("prompts", [PADDED, EVEN])
@pytest.mark.parametrize("family", sorted(GROWING & set(FAMILIES)))
def test_families(family, prompts, request):
    policy, step = family_policy(family), a_step()
    policy.eos_ids = ENDS
    assert_same(policy, step, prompts=prompts, length=12, group=4)
    assert step.failure == ""
    by_the_model = request.getfixturevalue("by_the_model")  # once it is compiled
    assert_same(policy, step, prompts=prompts, length=10, group=6)
    assert not [n for n in by_the_model if n > 1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bfloat16", "lora", "float64"])
def test_precisions_and_adapters(how):
    policy, step = make_policy(dtype="float32" if how == "lora" else how), a_step()
    if how == "lora":
        add_lora(policy, r=2)
        with torch.no_grad():
            for p in policy.trainable_parameters():
                p.normal_(std=0.2)
    if how == "bfloat16":  # another rounding may draw another token
        found, expected = sampled(policy, step), sampled(policy)
        first = (found.completion_ids[:, :2] == expected.completion_ids[:, :2]).all(1)
        assert float(first.float().mean()) > 0.6
        assert (found.logprobs - expected.logprobs)[first, :2].abs().max() < 0.2
    else:
        assert_same(policy, step)  # positions are rotated in float32 even where all else is float64
    assert step.failure == ""
