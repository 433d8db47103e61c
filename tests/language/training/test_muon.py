"""Muon: its steps by torch's own optimisers on each part, also with the state of a checkpoint."""

from __future__ import annotations

import copy

import torch
from tiny_models import apart, make_learner, make_policy, one_step, weights

from tokenrl.language.training.optimizer import Muon

HOW = {"lr": 0.01, "weight_decay": 0.1}


def test_matrices_inside_have_muon_and_the_rest_adamw_at_one_rate():
    learner = make_learner(make_policy(), optimizer="muon", learning_rate=0.01, weight_decay=0.1)
    model = learner.policy.model
    by_hand = copy.deepcopy(model)
    inside = [p for n, p in by_hand.named_parameters() if "layers." in n and "norm" not in n]
    rest = [p for p in by_hand.parameters() if all(p is not x for x in inside)]
    optimizers = torch.optim.Muon(inside, **HOW), torch.optim.AdamW(rest, **HOW)
    for step in (1, 2):
        one_step(learner, step=step)
        for weight, trained in zip(by_hand.parameters(), model.parameters(), strict=True):
            weight.grad = trained.grad
        for optimizer in optimizers:
            optimizer.step()
        assert apart(weights(by_hand), weights(model)) < 1e-6
        state = copy.deepcopy(learner.state_dict())
        learner.optimizer = learner.accelerator.prepare(Muon(model, **HOW))
        learner.load_state_dict(state)
