"""Heads against torch.distributions and autograd; the scale of observations against plain statistics."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

from tokenrl.control.policies import LOG_STD_RANGE, ObservationScale, Policy, Shape


def policy_of(head, actions, *, hidden=(5,), critic=None, **options):
    policy = Policy(
        Shape(3, head, actions, hidden=hidden, critic=critic, **options),
        torch.Generator().manual_seed(1),
    )
    with torch.no_grad():
        policy.head.weight.mul_(100)  # away from the nearly uniform start
    return policy.double()


def observations(count=6):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(2), dtype=torch.double)


def test_initial_weights():
    """Orthogonal weights with a head near 0 make a uniform policy; the uniform ones are those of PyTorch."""
    x = observations()
    first = Policy(Shape(3, "softmax", 4, (64,)), torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(
        first(x).softmax(-1), torch.full((6, 4), 0.25).double(), atol=0.02, rtol=0
    )
    kind = Shape(3, "softmax", 4, (64,), critic="shared", initial_weights="uniform")
    policy, again = (Policy(kind, torch.Generator().manual_seed(1)) for _ in range(2))
    for layer in (policy.body[0], policy.head, policy.critic):
        for weight in layer.parameters():
            bound = layer.in_features**-0.5
            assert weight.abs().max() <= bound and weight.abs().max() > 0.3 * bound
    deviation = policy.head.weight.detach().std() * 64**0.5
    # of numbers uniform between -1 and 1
    assert float(deviation) == pytest.approx(3**-0.5, rel=0.15)
    assert all(map(torch.equal, policy.parameters(), again.parameters()))


def test_log_std_stays_in_its_range():
    policy, x = policy_of("gaussian", 2), observations(1)
    for bias, limit in ((1e3, LOG_STD_RANGE[1]), (-1e3, LOG_STD_RANGE[0])):
        with torch.no_grad():
            policy.head.bias[2:] = bias
        spread = policy.act(x, torch.ones(1, 2, dtype=torch.double)) - policy.act(x, None)
        torch.testing.assert_close(
            spread, torch.full_like(spread, limit).exp(), rtol=1e-6, atol=1e-12
        )
    assert LOG_STD_RANGE == (-20, 2)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_outputs_and_gradients_are_those_of_the_modules(activation, critic):
    policy, x = (
        policy_of("softmax", 2, hidden=(5, 4), critic=critic, activation=activation),
        observations(),
    )
    before = x.clone()
    outputs = (
        policy.head(policy.body(x)),
        policy.critic(policy.body(x) if critic == "shared" else x)[:, 0],
    )
    for output, expected in zip((policy(x), policy.values(x)), outputs, strict=True):
        assert torch.equal(output, expected)
        slopes = (
            torch.autograd.grad(y.sum(), policy.parameters(), allow_unused=True)
            for y in (output, expected)
        )
        for one, two in zip(*slopes, strict=True):
            assert one is two is None or torch.equal(one, two)
    assert torch.equal(x, before)


def test_observation_scale_is_mean_and_std_of_all_that_was_seen():
    scale, inputs = ObservationScale(3), 3 + 5 * observations(40).float()
    assert torch.equal(scale(inputs), inputs)  # before anything was seen
    for part in inputs.split([1, 17, 22]):
        scale.update(part)
    expected = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    torch.testing.assert_close(scale(inputs), expected, rtol=1e-4, atol=1e-5)
    far = inputs[:1] + 1e6
    assert scale(far).max() == 10


@pytest.mark.parametrize(("head", "size"), [("softmax", 4), ("gaussian", 2)])
def test_scores_are_those_of_torch_and_their_norms_those_of_autograd(head, size):
    policy, x = policy_of(head, size), observations()
    if head == "softmax":
        actions, expected = torch.tensor([0, 1, 2, 3, 1, 0]), Categorical(logits=policy(x))
    else:
        actions = torch.randn(6, 2, generator=torch.Generator().manual_seed(3), dtype=torch.double)
        mean, log_std = policy(x).chunk(2, -1)
        expected = Independent(Normal(mean, log_std.exp()), 1)
    scored = policy.score(x, actions)
    torch.testing.assert_close(scored.logprobs, expected.log_prob(actions))
    torch.testing.assert_close(scored.entropy, expected.entropy())
    slopes = [
        torch.autograd.grad(y.sum(), policy.head.bias) for y in (scored.entropy, expected.entropy())
    ]
    torch.testing.assert_close(*slopes)
    parameters = policy(x).detach().requires_grad_()
    policy.forward = lambda _: parameters
    (slope,) = torch.autograd.grad(policy.score(x, actions).logprobs.sum(), parameters)
    torch.testing.assert_close(scored.score_norms, slope.square().sum(-1))
    if head == "softmax":  # the score is one-hot minus the probabilities
        torch.testing.assert_close(slope, torch.eye(4).double()[actions] - parameters.softmax(-1))


@pytest.mark.parametrize("head", ["softmax", "gaussian"])
def test_drawn_actions_follow_the_distribution(head):
    policy, x, count = policy_of(head, 3), observations(1), 40_000
    with torch.no_grad():
        policy.head.bias[:3] = torch.tensor([1.5, 0.0, -1.0])
    noise = policy.noise(count, generator=torch.Generator().manual_seed(4)).double()
    actions = policy.act(x.expand(count, -1), noise)
    if head == "softmax":
        chances = policy(x).softmax(-1)[0].detach()
        error = (chances * (1 - chances) / count).sqrt()
        assert ((actions.bincount(minlength=3) / count - chances).abs() < 5 * error).all()
        assert chances.max() < 0.95 and policy.act(x, None).item() == chances.argmax()
    else:
        mean, log_std = policy(x)[0].detach().chunk(2)
        std = log_std.exp()
        assert ((actions.mean(0) - mean).abs() < 5 * std / count**0.5).all()
        assert ((actions.std(0) / std - 1).abs() < 5 / (2 * count) ** 0.5).all()
        assert torch.equal(policy.act(x, None)[0], mean)


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_critics(critic):
    policy, x = policy_of("softmax", 2, critic=critic), observations()
    policy.values(x).sum().backward()
    assert (policy.body[0].weight.grad is None) == (critic == "separate")
    own, apart = policy.policy_parameters(), policy.value_parameters()
    assert bool(apart) == (critic == "separate") and {*own, *apart} == set(policy.parameters())
    assert len(own) + len(apart) == len(list(policy.parameters()))
