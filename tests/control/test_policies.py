"""Heads against torch.distributions and autograd; the scale of observations against plain statistics."""

from __future__ import annotations

import math

import pytest
import torch
from drawing import normals, seeded
from torch.distributions import Categorical, Independent, Normal
from torch.testing import assert_close

from tokenrl.control.policies import ObservationScale, Policy, Shape


def policy_of(head, actions, *, hidden=(5,), critic=None, **options):
    policy = Policy(
        Shape(3, head, actions, hidden=hidden, critic=critic, **options),
        seeded(1),
    )
    with torch.no_grad():
        policy.head.weight.mul_(100)  # away from the nearly uniform start
    return policy.double()


def observations(count=6):
    return normals(seeded(2), count, 3)


def test_initial_weights():
    """Orthogonal weights with a head near 0 make a uniform policy; the uniform ones are those of PyTorch."""
    first = Policy(Shape(3, "softmax", 4, (64,)), seeded(1)).double()
    chances = first(observations()).softmax(-1)
    assert_close(chances, torch.full((6, 4), 0.25).double(), atol=0.02, rtol=0)
    shape = Shape(3, "softmax", 4, (64,), critic="shared", initial_weights="uniform")
    policy = Policy(shape, seeded(1))
    for layer in (policy.body[0], policy.head, policy.critic):
        for weight in layer.parameters():
            largest = weight.abs().max() * layer.in_features**0.5
            assert 0.3 < largest <= 1


@pytest.mark.parametrize(("bias", "limit"), [(1e3, 2.0), (-1e3, -20.0)])
def test_log_std_stays_in_its_range(bias, limit):
    policy, x = policy_of("gaussian", 2), observations(1)
    policy.head.bias.data[2:] = bias
    spread = policy.act(x, torch.ones(1, 2, dtype=torch.double)) - policy.act(x, None)
    assert spread[0].tolist() == pytest.approx([math.exp(limit)] * 2, rel=1e-6)


def test_observation_scale_is_mean_and_std_of_all_that_was_seen():
    scale, inputs = ObservationScale(3), 3 + 5 * observations(40).float()
    assert torch.equal(scale(inputs), inputs)  # before anything was seen
    for part in inputs.split([1, 17, 22]):
        scale.update(part)
    expected = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    assert_close(scale(inputs), expected, rtol=1e-4, atol=1e-5)
    far = inputs[:1] + 1e6
    assert scale(far).max() == 10


@pytest.mark.parametrize(
    ("head", "size", "masked"),
    [("softmax", 4, False), ("softmax", 4, True), ("gaussian", 2, False)],
)
def test_scores_are_those_of_torch_and_their_norms_those_of_autograd(head, size, masked):
    policy, x = policy_of(head, size, action_masks=masked), observations()
    if masked:  # each allows the action below and another one, or that action alone
        others = [0, 2, 2, 0, 3, 1]
        x = torch.cat([x, torch.eye(4)[[0, 1, 2, 3, 1, 0]] + torch.eye(4)[others]], 1)
    parameters = policy(x).detach().requires_grad_()
    policy.forward = lambda _: parameters
    if head == "softmax":
        actions, expected = torch.tensor([0, 1, 2, 3, 1, 0]), Categorical(logits=parameters)
    else:
        actions = normals(seeded(3), 6, 2)
        mean, log_std = parameters.chunk(2, -1)
        expected = Independent(Normal(mean, log_std.exp()), 1)
    scored = policy.score(x, actions)
    assert_close(scored.logprobs, expected.log_prob(actions))
    assert_close(scored.entropy, expected.entropy())
    slopes = [
        torch.autograd.grad(y.sum(), parameters, retain_graph=True)[0]
        for y in (scored.entropy, expected.entropy(), scored.logprobs, expected.log_prob(actions))
    ]
    assert_close(slopes[0], slopes[1])
    assert_close(slopes[2], slopes[3])
    assert_close(scored.score_norms, slopes[2].square().sum(-1))


@pytest.mark.parametrize("head", ["softmax", "gaussian"])
def test_drawn_actions_follow_the_distribution(head):
    policy, x, count = policy_of(head, 3), observations(1), 40_000
    policy.head.bias.data[:3] = torch.tensor([1.5, 0.0, -1.0])
    noise = policy.noise(count, generator=seeded(4)).double()
    actions = policy.act(x.expand(count, -1), noise)
    parameters = policy(x)[0].detach()
    if head == "softmax":
        chances = parameters.softmax(-1)
        error = (chances * (1 - chances) / count).sqrt()
        assert ((actions.bincount(minlength=3) / count - chances).abs() < 5 * error).all()
        assert chances.max() < 0.95 and policy.act(x, None).item() == chances.argmax()
    else:
        mean, log_std = parameters.chunk(2)
        scores = (actions - mean) / log_std.exp()
        assert (scores.mean(0).abs() < 5 / count**0.5).all()
        assert ((scores.std(0) - 1).abs() < 5 / (2 * count) ** 0.5).all()
        assert torch.equal(policy.act(x, None)[0], mean)
