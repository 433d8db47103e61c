"""A copy of a model computes with its own weights, or is refused: functions on instances stay with the original."""

from __future__ import annotations

import copy
from types import MethodType

import pytest
import torch
from refusals import refused
from tiny_models import make_learner, make_model, make_policy, make_tokenizer
from torch.nn.functional import linear

from tests.states import as_bits
from tokenrl.core.estimator import Estimator
from tokenrl.language.policy.copies import copied, frozen_copy
from tokenrl.language.policy.model import Policy, wrap
from tokenrl.language.rollout.forward import half_copy
from tokenrl.language.rollout.generator import LaggedGenerator, TransformersGenerator
from tokenrl.language.supervised.base import with_own_weights

IDS = torch.tensor([[3, 5, 7, 9]])


def behind(module):
    """Put a function on a module that calls what the module has computed so far."""
    forward = module.forward
    module.forward = lambda *inputs, **options: forward(*inputs, **options)


def compiled(module):
    module.forward = torch.compile(module.forward, backend="eager")


def with_alias(module):
    weight = module.weight.detach()
    module.forward = lambda x: linear(x, weight)


PUT = {
    "function": behind,
    "head": lambda model: behind(model.lm_head),
    "layer": lambda model: compiled(model.model.layers[1].mlp),
    "alias": lambda model: with_alias(model.lm_head),
    "of a copy": lambda model: behind(model) or setattr(model, "forward", make_model().forward),
}
COPIES = {
    "reference": Policy.add_reference,
    "own teacher": lambda policy: frozen_copy(policy.model),
    "older sampler": lambda policy: LaggedGenerator(TransformersGenerator(policy), 2),
    "bfloat16": half_copy,
    "of the caller": lambda policy: with_own_weights(policy, (policy.model, policy.tokenizer)),
}


@pytest.mark.parametrize(
    ("made", "put"),
    [
        *(("reference", put) for put in PUT),
        *((made, "layer") for made in COPIES if made != "reference"),
    ],
)
def test_a_copy_that_computes_with_other_weights_is_refused(made, put):
    policy = make_policy()
    PUT[put](policy.model)
    weights = copy.deepcopy(policy.model.state_dict())
    with refused(r"does not compute with its own weights.*compile\(\)"):
        COPIES[made](policy)
    assert as_bits(policy.model.state_dict()) == as_bits(weights)


def test_a_policy_that_is_such_a_copy_already_is_refused():
    model = make_model()
    behind(model)
    policy = wrap(copy.deepcopy(model), make_tokenizer())
    with refused(r"No weight of .* changes its log-probabilities"):
        make_learner(policy, Estimator())


@pytest.mark.parametrize("regime", ["plain", "method", "in place", "wrapped"])
def test_a_copy_follows_its_own_weights_alone(regime):
    """What torch or Python copies rightly is not refused; a wrapped model counts as the one inside."""
    model = make_model()
    if regime == "method":
        model.forward = MethodType(type(model).forward, model)
    if regime == "in place":
        model.compile(backend="eager")
        model(IDS)
    given = torch.compile(model, backend="eager") if regime == "wrapped" else model
    assert wrap(given, make_tokenizer()).model is model
    before, twin = make_model()(IDS).logits, copied(model)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert torch.equal(twin(IDS).logits, before)
    assert not torch.equal(model(IDS).logits, before)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    assert torch.equal(twin(IDS).logits, model(IDS).logits)
