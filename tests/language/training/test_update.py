"""The gradient of whole steps: that of the textbook, however the step is split into micro-batches."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny_models import (
    ENDS,
    apart,
    flat_second_prompt,
    gradient,
    make_learner,
    make_policy,
    one_step,
    preset_for_groups_of_three,
    quickly,
    raised,
    recorded,
    scored,
    stepped,
    textbook,
    vowel_reward,
    weights,
)

from tests.states import as_bits
from tokenrl.core.estimator import Estimator
from tokenrl.core.memories import RunningMean
from tokenrl.core.presets import PRESETS
from tokenrl.errors import Stopped
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.training import step as module
from tokenrl.language.training.learner import Learner

ESTIMATORS = {name: preset_for_groups_of_three(name) for name in PRESETS} | {
    "kl in the reward": Estimator(beta=0.3),
    "kl in the loss": Estimator.preset("grpo", beta=0.3),
    "entropy": Estimator(entropy_coef=0.1),
    "reward to go": Estimator(returns="reward_to_go", gamma=0.9, aggregation="token_mean"),
}
QUICK = (
    "rloo",
    "dapo",
    "ppo",
    "vapo",
    "sao",
    "remax",
    "optimal",
    "gspo",
    "entropy",
    "kl in the loss",
)
"""Those that differ from the others in more than their advantages."""


SHORT = {"pass_overhead": 1}


def scored_rows(monkeypatch):
    """How many rows each forward pass of the update scores from now on."""
    sizes, score = [], Learner.score

    def counting(learner, part):
        sizes.append(len(part.mask))
        return score(learner, part)

    monkeypatch.setattr(Learner, "score", counting)
    return sizes


def abstaining(prompts, completion_ids, **_):
    scores = flat_second_prompt(prompts, completion_ids)
    return [None if i == 7 else s for i, s in enumerate(scores)]


@pytest.mark.parametrize("name", quickly(ESTIMATORS, ESTIMATORS.keys() - {*QUICK}))
def test_the_gradient_does_not_depend_on_micro_batches(name, monkeypatch):
    sizes = scored_rows(monkeypatch)
    reward = raised(abstaining) if ESTIMATORS[name].objective == "log_success" else abstaining
    options = {"reward": reward, "architecture": "gpt2", "dtype": "float64"}
    expected, record, _ = stepped(ESTIMATORS[name], **options)
    assert expected.norm() > 0.01
    assert record.metrics["frac_rows_abstained"] == pytest.approx(1 / 12)
    # 12 rows: groups cut in two; passes of whole groups by their tokens, and of equal lengths.
    for limit in ({"micro_batch_size": 2}, {"tokens_per_pass": 40}, SHORT):
        sizes.clear()
        result, other, _ = stepped(ESTIMATORS[name], **limit, **options)
        assert apart(result, expected) < 1e-13
        few = name in (
            "max_at_k",
            "dsr",
        )  # which learn from so few rows that these may fit into one pass
        assert len(sizes) > 1 or (few and "micro_batch_size" not in limit)
        assert max(sizes) == limit.get("micro_batch_size", max(2, *sizes))
        metrics = record.metrics | {"padding": other.metrics["padding"]}
        assert other.metrics == pytest.approx(metrics, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("share", "temperature", "truncations"),
    [(True, 0.7, "keep"), (False, 1.0, "keep"), (True, 1.0, "mask")],
)
@pytest.mark.parametrize("name", ["reinforce", "reinforce_running_mean", "rloo", "dr_grpo", "grpo"])
def test_the_gradient_is_the_textbook_sum(name, share, temperature, truncations):
    """Truncated rows that are masked have no gradient, and count in the baseline and in the divisor."""
    policy = make_policy("gpt2", dtype="float64")
    policy.eos_ids = ENDS
    before, seen = copy.deepcopy(policy.model), []
    estimator = Estimator.preset(name, truncations=truncations)
    learner = make_learner(policy, estimator, temperature=temperature, micro_batch_size=5, **SHORT)
    scored(learner, share_prompt=share)
    record = one_step(learner, reward=recorded(flat_second_prompt, seen))
    rewards = torch.tensor([reward for *_, reward in seen], dtype=torch.double)
    how = {"group_size": 3, "baseline_value": 0.2}  # where `one_step` begins its running mean
    advantages = Estimator.preset(name).advantages(rewards, torch.ones(12, 1), **how).policy
    rows = []
    for (prompt, ids, _), advantage in zip(seen, advantages.tolist(), strict=True):
        share_of_token = {"dr_grpo": 6, "grpo": len(ids)}.get(name, 1)  # 6: max_completion_length
        if truncations == "mask" and ids[-1] not in ENDS:
            advantage = 0.0
        rows.append((policy.encode(prompt), ids, advantage / share_of_token))
    expected, loss = textbook(before, rows, temperature=temperature)
    assert expected.norm() > 0.1
    assert apart(gradient(policy.model), expected) < 1e-10
    assert 0 < sum(ids[-1] in ENDS for _, ids, _ in seen) < 12
    if "ratio" not in PRESETS[name].fields:  # with a ratio the loss is that of rho, same gradient
        assert record.metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert record.metrics["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-6)


def test_rows_of_zero_advantage_are_skipped_but_counted(monkeypatch):
    rows = scored_rows(monkeypatch)
    _, record, _ = stepped(ESTIMATORS["rloo"])
    assert sum(rows) == 9 and record.metrics["completions/mean_length"] > 0
    for name in ("entropy", "kl in the loss"):  # a term of the loss's own reaches every row
        rows.clear()
        _, _, learner = stepped(ESTIMATORS[name], reward=equal)
        assert sum(rows) == 12 and learner.idle == 0


def equal(completions, **_):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("estimator", "options"),
    [
        ("rloo", {}),
        ("grpo", {"num_iterations": 2, "num_minibatches": 2}),
        ("dapo", {"max_refills": 1}),
        ("ppo", {"num_iterations": 2}),
        ("tpo", {"num_iterations": 2}),
    ],
)
def test_a_step_without_a_signal_leaves_the_weights_and_the_moments_alone(estimator, options):
    policy = make_policy()
    learner = make_learner(policy, estimator, weight_decay=0.1, **options)
    if learner.critic is not None:  # values that predict every reward leave no advantage
        learner.critic.values = lambda hidden: torch.ones(hidden.shape[:2])
        learner.critic.update = lambda *_: 0.0
    one_step(learner)
    before, idle = weights(policy.model), learner.idle
    moments = copy.deepcopy(learner.optimizer.state_dict()["state"])
    assert any(state["exp_avg"].any() for state in moments.values())
    metrics = one_step(learner, step=2, reward=equal).metrics
    assert metrics["loss"] == metrics["grad_norm"] == 0 and metrics["frac_reward_zero_std"] == 1
    assert torch.equal(weights(policy.model), before) and not gradient(policy.model).any()
    assert as_bits(moments) == as_bits(learner.optimizer.state_dict()["state"])
    assert learner.idle - idle == learner.args.num_iterations * learner.args.num_minibatches
    one_step(learner, step=3)
    assert not torch.equal(weights(policy.model), before)


def test_the_norm_is_clipped_and_reported_as_it_was_beside_the_share_of_clipped_updates():
    plain, record, _ = stepped(ESTIMATORS["rloo"])
    norm = record.metrics["grad_norm"]
    for limit, share in ((norm * 1.01, 0.0), (norm / 2, 1.0)):
        result, other, _ = stepped(ESTIMATORS["rloo"], max_grad_norm=limit)
        assert other.metrics["grad_norm"] == pytest.approx(norm)
        assert other.metrics["grad_clipped"] == share
        assert apart(result, plain * min(1, limit / norm)) < 1e-4
    several = make_learner(make_policy(), "grpo", num_minibatches=4, max_grad_norm=1e-9)
    metrics = one_step(several, reward=flat_second_prompt).metrics
    assert metrics["grad_clipped"] == 0.75 and several.idle == 1  # a prompt of equal rewards


def test_the_critic_alone_learns_in_its_warm_up():
    learner = make_learner(make_policy(), "a2c", value_warmup=2)
    start, head = weights(learner.policy.model), copy.deepcopy(learner.critic.head.state_dict())
    records = [one_step(learner, step=step) for step in (1, 2)]
    assert torch.equal(weights(learner.policy.model), start)
    moved = learner.critic.head.state_dict()
    assert not any(torch.equal(moved[name], head[name]) for name in ("1.weight", "1.bias"))
    assert records[0].metrics["num_tokens"] > 0 and records[0].metrics["explained_variance"] == 0
    assert records[1].metrics["explained_variance"] != 0
    one_step(learner, step=3)
    assert not torch.equal(weights(learner.policy.model), start)


def test_a_row_that_abstains_is_not_in_the_running_mean():
    mean, seen = RunningMean(0.9, 0.2), []
    learner = make_learner(make_policy(), "reinforce_running_mean")
    one_step(learner, reward=recorded(abstaining, seen), running_mean=mean)
    values = [reward for *_, reward in seen if reward is not None]
    assert len(values) == 11 and mean.value == pytest.approx(0.9 * 0.2 + 0.1 * sum(values) / 11)


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_then_stops():
    policy, level = make_policy(), [1e38]
    far_below = Estimator(baseline=lambda totals, **_: totals - level[0])  # advantages of that size
    learner = make_learner(policy, far_below, stop_after_nonfinite=2)
    before = weights(policy.model)
    record = one_step(learner)
    assert not math.isfinite(record.metrics["grad_norm"]) and learner.skipped == 1
    assert torch.equal(weights(policy.model), before)
    level[0] = 1.0
    one_step(learner)
    assert learner.nonfinite == 0 and not torch.equal(weights(policy.model), before)
    level[0] = 1e38
    one_step(learner)
    with pytest.raises(Stopped, match="2 updates in a row"):
        one_step(learner)
    assert learner.skipped == 3 and torch.isfinite(weights(policy.model)).all()


def test_minibatches_keep_groups_whole_and_the_seed_decides_which():
    """They were the same for every seed, because torch ignores a seed's higher bits."""
    partitions = set()
    learner = make_learner(make_policy(), "grpo", num_minibatches=3, num_iterations=2)
    for seed in range(9):
        learner.args = replace(learner.args, seed=seed)
        chosen = torch.stack([*module.minibatches(learner, 12, 1)]).view(2, 3, 4, 3)
        assert (chosen.sum(dim=1) == 1).all()  # each row once an iteration
        assert (chosen.all(dim=3) == chosen.any(dim=3)).all()
        partitions.add(str(chosen[0]))
    assert len(partitions) > 2


@pytest.mark.parametrize(
    "bound", [{"epsilon": 1e-4}, {"ratio": "trust", "trust_bound": 1e-5}], ids=str
)
def test_the_ratio_starts_at_one_and_then_moves(monkeypatch, bound):
    rows, updates = spied(monkeypatch, "experience"), spied(monkeypatch, "update_metrics")
    estimator = Estimator.preset("dr_grpo", **bound)
    first, _, _ = stepped(estimator)
    assert rows[0].old_logprobs is None and updates[0]["clip_ratio"] == 0
    updates.clear()
    stepped(estimator, num_iterations=3, learning_rate=0.003)
    clipped = [metrics["clip_ratio"] for metrics in updates]
    assert len(updates) == 3 and clipped[0] == 0 and min(clipped[1:]) > 0.2
    assert updates[0]["grad_norm"] == pytest.approx(float(first.norm()), rel=1e-5)


def test_old_logprobs_are_those_of_the_policy_that_sampled(monkeypatch):
    rows = spied(monkeypatch, "experience")
    stepped(ESTIMATORS["grpo"], num_iterations=2, micro_batch_size=5, temperature=0.7)
    assert len(rows) == 1  # once a step, before its updates
    old, mask = rows[0].old_logprobs, rows[0].mask
    torch.testing.assert_close(old[mask], rows[0].logprobs[mask], atol=1e-5, rtol=0)


def test_minibatches_compute_and_weigh_their_own_rows(monkeypatch):
    """With the weights kept still, the minibatches' losses average to that of the step."""
    sizes = scored_rows(monkeypatch)
    settings = {"learning_rate": 1e-12, "reward": vowel_reward, "seed": 2**32 - 1}
    whole, parts = (
        stepped(Estimator(ratio="token"), **settings, num_minibatches=count)[1].metrics["loss"]
        for count in (1, 2)
    )
    assert sizes == [12, 6, 6] and parts == pytest.approx(whole, rel=1e-4)


def spied(monkeypatch, name):
    """Record what a function of the step returns."""
    calls, real = [], getattr(module, name)
    monkeypatch.setattr(
        module, name, lambda *of, **how: calls.append(real(*of, **how)) or calls[-1]
    )
    return calls


def test_reward_functions_apart_are_weighted_after_their_scale():
    """With a scale only the weight of a function matters, not its size."""

    def advantages(size, weight):
        def sized(completion_ids, **_):
            return [size * (ids[0] % 5) for ids in completion_ids]

        fields = {"baseline": "group_mean", "scale": "group_std", "scale_eps": 0.0}
        learner = make_learner(make_policy(), Estimator(components="separate", **fields))
        record = one_step(learner, reward=Rewards([vowel_reward, sized], [1, weight]))
        return [row["advantage"] for row in record.rows()]

    expected = pytest.approx(advantages(100.0, 0.5), abs=1e-6)
    assert advantages(1.0, 0.5) == expected != advantages(100.0, 0.25)


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_step_of_sgd_is_the_gradient_times_the_rate(decay):
    settings = {"max_grad_norm": 0.0, "weight_decay": decay}
    policy, other = make_policy(dtype="float64"), make_policy(dtype="float64")
    learner = make_learner(policy, "rloo", optimizer="sgd", learning_rate=0.3, **settings)
    before = weights(policy.model)
    one_step(learner)
    one_step(make_learner(other, "rloo", **settings))  # AdamW's, whose gradient is the same
    expected = before - 0.3 * (gradient(other.model) + decay * before)
    assert gradient(other.model).norm() > 0.1
    torch.testing.assert_close(weights(policy.model), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["rloo", "grpo", "remax", "dapo", "rloo,components=separate"])
def test_a_constant_that_all_rewards_hold_changes_nothing(name):
    """Rewards of 10^9 and 10^9 + 1 differ by 1, which float32 does not hold."""
    results = []
    for constant in (0, 1e9):
        learner = make_learner(make_policy(), preset_for_groups_of_three(name))
        reward = lambda completion_ids, **_: [constant + sum(ids) % 2 for ids in completion_ids]  # noqa: B023, E731
        metrics = one_step(learner, reward=reward).metrics
        spread = metrics["frac_reward_zero_std"], metrics["reward_std"]
        results.append((spread, gradient(learner.policy.model)))
    (near, slope), (far, steep) = results
    assert near == pytest.approx(far) and near[1] > 0
    assert apart(slope, steep) < 1e-6 and slope.norm() > 1
