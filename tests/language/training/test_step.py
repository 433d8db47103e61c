"""Several updates a rollout: the ratio, the clip, minibatches of whole groups."""

import copy

import pytest
import torch
from tiny_models import (
    apart,
    by_hand,
    gradient,
    make_learner,
    make_policy,
    one_step,
    recorded,
    stepped,
    vowel_reward,
)

from tokenrl.core.estimator import Estimator
from tokenrl.errors import Refused
from tokenrl.language.training import step as module

GRPO = Estimator.preset("grpo")


def spy_updates(monkeypatch):
    """Record [chosen rows, the step's rows, metrics] of every update."""
    calls, weigh, report = [], module.token_weights, module.update_metrics

    def weights(learner, batch, chosen):
        calls.append([chosen.clone(), batch])
        return weigh(learner, batch, chosen)

    def metrics(*given):
        calls[-1].append(report(*given))
        return calls[-1][2]

    monkeypatch.setattr(module, "token_weights", weights)
    monkeypatch.setattr(module, "update_metrics", metrics)
    return calls


def test_the_ratio_starts_at_one_and_then_moves(monkeypatch):
    calls = spy_updates(monkeypatch)
    estimator = Estimator.preset("dr_grpo", epsilon=1e-4)
    first, _, _ = stepped(estimator)
    assert calls[0][1].old_logprobs is None and calls[0][2]["clip_ratio"] == 0
    calls.clear()
    stepped(estimator, num_iterations=3, learning_rate=0.003)
    clipped = [metrics["clip_ratio"] for *_, metrics in calls]
    assert len(calls) == 3 and clipped[0] == 0 and min(clipped[1:]) > 0.2
    old = calls[0][1].old_logprobs
    assert all(torch.equal(batch.old_logprobs, old) for _, batch, _ in calls)
    assert calls[0][2]["grad_norm"] == pytest.approx(float(first.norm()), rel=1e-5)


def test_old_logprobs_are_those_of_the_policy_that_sampled(monkeypatch):
    calls = spy_updates(monkeypatch)
    stepped(GRPO, num_iterations=2, micro_batch_size=5, temperature=0.7)
    for _, batch, _ in calls:
        mask, sampled = batch.rollout.mask, batch.rollout.logprobs
        torch.testing.assert_close(batch.old_logprobs[mask], sampled[mask], atol=1e-5, rtol=0)


def test_a_second_iteration_uses_the_clipped_ratio():
    """Against PPO's formula written out on the weights after the first update."""
    policy = make_policy("gpt2", dtype="float64")
    before, seen = copy.deepcopy(policy.model), []
    learner = make_learner(policy, "dr_grpo", learning_rate=0.003)
    one_step(learner, reward=recorded(vowel_reward, seen))
    middle = copy.deepcopy(policy.model)
    again = make_policy("gpt2", dtype="float64")
    learner = make_learner(again, "dr_grpo", learning_rate=0.003, num_iterations=2)
    one_step(learner)
    middle.zero_grad()
    loss, clipped = 0.0, 0
    for start in range(0, 12, 3):
        advantages = by_hand("dr_grpo", [r for *_, r in seen[start : start + 3]])
        for (prompt, ids, _), a in zip(seen[start : start + 3], advantages, strict=True):
            whole = torch.tensor([policy.encode(prompt) + ids])
            at = slice(whole.shape[1] - len(ids) - 1, -1)
            new, old = (
                torch.log_softmax(m(whole).logits[0, at], -1).gather(1, whole[0, -len(ids) :, None])
                for m in (middle, before)
            )
            rho = (new - old.detach()).exp()
            loss = loss - torch.minimum(rho * a, rho.clamp(0.8, 1.2) * a).sum() / (12 * 6)
            clipped += int(((rho > 1.2) | (rho < 0.8)).sum())
    loss.backward()
    assert clipped > 5
    assert apart(gradient(again.model), gradient(middle)) < 1e-9


@pytest.mark.parametrize("minibatches", [2, 3, 4])
def test_minibatches_keep_groups_whole(monkeypatch, minibatches):
    calls = spy_updates(monkeypatch)
    stepped(GRPO, num_minibatches=minibatches, num_iterations=2)
    assert len(calls) == 2 * minibatches
    for first in (0, minibatches):
        chosen = torch.stack([c for c, *_ in calls[first : first + minibatches]])
        assert (chosen.sum(dim=0) == 1).all()  # each row once an iteration
        groups = chosen.view(minibatches, 4, 3)
        assert (groups.all(dim=2) == groups.any(dim=2)).all()


def test_a_minibatch_computes_its_own_rows_only(monkeypatch):
    scored, real = [], module.score

    def counting(model, part, **options):
        scored.append(len(part.mask))
        return real(model, part, **options)

    monkeypatch.setattr(module, "score", counting)
    stepped(GRPO, num_minibatches=2, reward=vowel_reward)
    assert scored == [6, 6]


def test_minibatches_weigh_their_own_rows():
    """With the weights kept still, the minibatches' losses average to that of the step."""
    _, whole, _ = stepped(Estimator(ratio="token"), learning_rate=1e-12)
    _, parts, _ = stepped(Estimator(ratio="token"), learning_rate=1e-12, num_minibatches=2)
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=1e-4)


def test_a_large_seed_works():
    _, record, _ = stepped(GRPO, seed=2**32 - 1, num_minibatches=2)
    assert record.metrics["grad_norm"] > 0


def test_several_updates_without_a_ratio_are_refused():
    with pytest.raises(Refused, match="ratio"):
        make_learner(make_policy(), "rloo", num_iterations=2)
