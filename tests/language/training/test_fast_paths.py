"""Twenty updates by every fast path leave the weights that twenty by none of them do."""

from __future__ import annotations

import pytest
from tiny_models import ENDS, make_learner, make_policy, one_step, weights

from tokenrl.core.estimator import Estimator
from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.layers import CompiledLayers
from tokenrl.language.training import update

STEPS = 20


class Player:
    """Gives recorded rollouts again."""

    def __init__(self, rollouts):
        self.rollouts = rollouts

    def generate(self, prompt_ids, sampling, draws):
        return self.rollouts[sampling.step - 1]

    def sync(self, policy):
        pass

    def close(self):
        pass


class Recorder(TransformersGenerator):
    """Keeps what it samples."""

    def generate(self, prompt_ids, sampling, draws):
        self.rollouts.append(super().generate(prompt_ids, sampling, draws))
        return self.rollouts[-1]


def trained(monkeypatch, estimator, *, fast, rollouts=None, layers=None, **options):
    """Train on recorded rollouts, or on new ones. Returns how the weights changed, and the rollouts."""
    policy = make_policy(initializer_range=0.1)
    policy.eos_ids, policy.share_prompt = ENDS, fast
    policy.tokens_at_once = 5 if fast else None
    policy.reference = make_policy(seed=1).model.requires_grad_(False)
    size = 2 if fast else None  # of a group's three rows, whose passes share their prompts
    options |= {"optimizer": "sgd", "learning_rate": 0.02, "micro_batch_size": size}
    learner = make_learner(policy, estimator, **options)
    # Passes that save time by themselves have rows of one length each; one that costs much has all rows.
    monkeypatch.setattr(update, "fixed_cost", lambda *_: -(10**3) if fast else 10**9)
    if rollouts is None:
        learner.generator = Recorder(policy)
        learner.generator.rollouts = rollouts = []
    else:
        learner.generator = Player(rollouts)
    learner.forward.layers = layers and layers(policy.model)
    before = weights(policy.model)
    for step in range(1, STEPS + 1):
        one_step(learner, step=step)
    return weights(policy.model) - before, rollouts


def compiled(model):
    layers = CompiledLayers(model)
    layers.making = True
    return layers


SEVERAL = (
    Estimator.preset("grpo", beta=0.1, entropy_coef=0.05),
    {"num_minibatches": 2, "num_iterations": 2},
)
"""Several updates of a rollout, with a KL and an entropy term."""


@pytest.mark.parametrize(
    ("estimator", "options", "layers"),
    [
        pytest.param(Estimator(), {}, None, marks=pytest.mark.slow),
        (*SEVERAL, None),
        pytest.param(*SEVERAL, compiled, marks=pytest.mark.slow),  # takes minutes
    ],
    ids=["plain", "several updates", "compiled"],
)
def test_every_fast_path_changes_the_weights_alike(estimator, options, layers, monkeypatch):
    passes, shared, usual = [], [], update.equal_passes

    def counted(*given):
        blocks = usual(*given)
        passes.append(sum(map(len, blocks)))
        shared.append(max(map(len, blocks), default=0))  # passes of a block, which computes its prompts once
        return blocks

    monkeypatch.setattr(update, "equal_passes", counted)
    slow, rollouts = trained(monkeypatch, estimator, fast=False, **options)
    assert max(passes) == 1
    fast, _ = trained(monkeypatch, estimator, fast=True, rollouts=rollouts, layers=layers, **options)
    assert max(passes) > 2 and max(shared) > 1 and len(rollouts) == STEPS
    assert slow.norm() > 0.01
    assert (fast - slow).norm() <= 1e-4 * slow.norm()
