"""Steps of several passes, in which a target of TPO stays fixed and the gate of delight does not, against loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny_models import (
    ENDS,
    apart,
    flat_second_prompt,
    make_learner,
    make_policy,
    one_step,
    recorded,
    textbook_logprobs,
    weights,
)

from tokenrl.core.estimator import Estimator

RATE = 0.05
STEP = {"optimizer": "sgd", "learning_rate": RATE, "weight_decay": 0.0}


def abstaining(prompts, completion_ids, **_):
    scores = flat_second_prompt(prompts, completion_ids)
    return [None if i == 7 else s for i, s in enumerate(scores)]


def logprobs_of(model, policy, row):
    prompt, ids, _ = row
    prompt = policy.encode(prompt)
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return textbook_logprobs(logits).gather(1, torch.tensor(ids)[:, None])[:, 0]


def cross_entropies(scores, rewards, eta, targets):
    """TPO's loss of each group of three, as its paper writes it; the targets are made in the first pass."""
    losses = []
    for number in range(0, len(rewards), 3):
        present = [i for i in range(number, number + 3) if rewards[i] is not None]
        log_p = torch.stack([scores[i].sum() for i in present]).log_softmax(0)
        if number not in targets:
            values = [rewards[i] for i in present]
            mean = sum(values) / len(values)
            std = math.sqrt(sum((x - mean) ** 2 for x in values) / len(values)) or 1.0
            tilt = torch.tensor([(x - mean) / std / eta for x in values], dtype=torch.double)
            tilted = log_p.detach().exp() * tilt.exp()
            targets[number] = tilted / tilted.sum()
        # a row that abstains counts in no mean over rows
        losses.append(-(targets[number] * log_p).sum() * len(present))
    return sum(losses) / sum(reward is not None for reward in rewards)


def delights(scores, rewards, eta, _):
    """The loss of DG: the mean over rows of the sums over tokens, with the mean of the step as the baseline."""
    present = [i for i, reward in enumerate(rewards) if reward is not None]
    mean = sum(rewards[i] for i in present) / len(present)
    loss = 0.0
    for i in present:
        for log_pi in scores[i]:
            advantage = rewards[i] - mean
            gate = 1 / (1 + math.exp(advantage * log_pi.item() / eta))
            loss = loss - gate * advantage * log_pi / len(present)
    return loss


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}], ids=str)
@pytest.mark.parametrize(
    ("name", "eta", "passes"), [("tpo", 0.1, 1), ("tpo", 0.1, 3), ("dg", 0.7, 3)]
)
def test_passes_over_a_step_are_those_of_a_loop(name, eta, passes, options):
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1)
    policy.eos_ids = ENDS
    model, seen = copy.deepcopy(policy.model), []
    estimator = Estimator.preset(name, eta=eta)
    learner = make_learner(policy, estimator, num_iterations=passes, **STEP, **options)
    one_step(learner, reward=recorded(abstaining, seen))
    rewards, targets = [reward for *_, reward in seen], {}
    before, losses = weights(model), {"tpo": cross_entropies, "dg": delights}
    for _ in range(passes):
        scores = [logprobs_of(model, policy, row) for row in seen]
        loss = losses[name](scores, rewards, eta, targets)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= RATE * weight.grad
    moved = weights(model) - before
    assert moved.norm() > 1e-3
    assert apart(weights(policy.model) - before, moved) < 1e-8


def test_a_group_of_equal_rewards_is_held_at_the_policy_that_sampled_once_others_have_moved_it():
    """Its target is that policy: no gradient in the first pass, and one in the second."""
    terms = {"group_size": 2, "valid": torch.ones(4).bool()}
    mask, rewards = torch.ones(4, 1), torch.tensor([1.0, 0.0, 0.5, 0.5])
    old = torch.tensor([[-1.0], [-2.0], [-0.5], [-1.5]])
    estimator = Estimator.preset("tpo")
    first = estimator.advantages(rewards, mask, logprobs=old, **terms).policy
    assert first[0] > 0 and first[2:].tolist() == [0, 0]
    still = estimator.advantages(rewards, mask, logprobs=old, present_logprobs=old, **terms)
    assert torch.equal(still.policy, first)
    moved = old + torch.tensor([[0.3], [-0.3], [0.3], [-0.3]])
    later = estimator.advantages(rewards, mask, logprobs=old, present_logprobs=moved, **terms)
    later = later.policy
    assert later[2] < 0 < later[3] and 0 < later[0] < first[0]
