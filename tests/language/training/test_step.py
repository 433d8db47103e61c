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


def spied(monkeypatch, name):
    """Record what a function of the step returns."""
    calls, real = [], getattr(module, name)

    def spy(*given, **options):
        calls.append(real(*given, **options))
        return calls[-1]

    monkeypatch.setattr(module, name, spy)
    return calls


def test_the_ratio_starts_at_one_and_then_moves(monkeypatch):
    old, updates = spied(monkeypatch, "old_logprobs"), spied(monkeypatch, "update_metrics")
    estimator = Estimator.preset("dr_grpo", epsilon=1e-4)
    first, _, _ = stepped(estimator)
    assert old == [None] and updates[0]["clip_ratio"] == 0
    updates.clear()
    stepped(estimator, num_iterations=3, learning_rate=0.003)
    clipped = [metrics["clip_ratio"] for metrics in updates]
    assert len(updates) == 3 and clipped[0] == 0 and min(clipped[1:]) > 0.2
    assert updates[0]["grad_norm"] == pytest.approx(float(first.norm()), rel=1e-5)


def test_old_logprobs_are_those_of_the_policy_that_sampled(monkeypatch):
    old, rows = spied(monkeypatch, "old_logprobs"), spied(monkeypatch, "step_rows")
    stepped(GRPO, num_iterations=2, micro_batch_size=5, temperature=0.7)
    assert len(old) == 1  # once a step, before its updates
    mask = rows[0].mask
    torch.testing.assert_close(old[0][mask], rows[0].logprobs[mask], atol=1e-5, rtol=0)


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
def test_minibatches_keep_groups_whole(minibatches):
    learner = make_learner(make_policy(), GRPO, num_minibatches=minibatches, num_iterations=2)
    chosen = torch.stack([rows for rows, _ in module.minibatches(learner, 12, 1)]).view(2, minibatches, 12)
    assert (chosen.sum(dim=1) == 1).all()  # each row once an iteration
    groups = chosen.view(2, minibatches, 4, 3)
    assert (groups.all(dim=3) == groups.any(dim=3)).all()


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
