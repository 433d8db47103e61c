"""Updates by every fast path leave the weights that as many by none of them do."""

from __future__ import annotations

import pytest
from tiny_models import ENDS, apart, make_learner, make_policy, one_step, scored, weights

from tokenrl.core.estimator import Estimator
from tokenrl.language.policy.lora import add_lora
from tokenrl.language.policy.model import enable_gradient_checkpointing
from tokenrl.language.rollout.cache import Cache

SEVERAL = Estimator.preset("grpo", beta=0.1, entropy_coef=0.05)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        (SEVERAL, {"num_minibatches": 2, "num_iterations": 2, "steps": 4}),
        pytest.param(Estimator(), {}, marks=pytest.mark.slow),
        pytest.param(Estimator(), {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(Estimator(), {"lora_r": 2}, marks=pytest.mark.slow),
    ],
    ids=["several updates", "plain", "recomputed", "adapter"],
)
def test_every_fast_path_changes_the_weights_alike(estimator, options, monkeypatch):
    grow, found = Cache.make_room, []
    options = dict(options)
    steps = options.pop("steps", 20)
    for fast in (False, True):
        policy = make_policy(initializer_range=0.1)
        policy.eos_ids = ENDS
        if options.get("gradient_checkpointing"):
            enable_gradient_checkpointing(policy)
        if options.get("lora_r"):
            add_lora(policy, r=2)
        attention, rows = ("eager", 2) if fast else ("as_loaded", None)  # 2 of a group's 3 rows
        how = {"optimizer": "sgd", "learning_rate": 0.02, "training_attention": attention, **options}
        learner = make_learner(policy, estimator, micro_batch_size=rows, **how)
        share = learner.forward.scoring.share_prompt
        assert share == ("gradient_checkpointing" not in options)
        scored(learner, share_prompt=share and fast, tokens_at_once=5 if fast else None)
        monkeypatch.setattr(Cache, "make_room", grow if fast else lambda self, tokens: None)
        for step in range(1, steps + 1):
            one_step(learner, step=step)
        found.append(weights(policy.model))
    start = weights(make_policy(initializer_range=0.1).model)
    assert "lora_r" in options or apart(start, found[0]) > 3e-3
    assert apart(*found) < 1e-4
