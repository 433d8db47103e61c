"""A training step on episodes has the gradient that autograd finds by hand, of the chosen tokens alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import family_policy
from tiny_environments import Faulty, Guess
from tiny_models import ENDS, PROMPTS, apart, gradient, make_learner, make_policy, one_step

from tokenrl.core import Estimator
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.training.rows import collect_rows

LIMIT, SIZE = 10, 3
"""The most tokens that the policy may choose in an episode, and the episodes of a group."""
ESTIMATORS = {
    "rloo": Estimator(),
    "to go": Estimator(returns="reward_to_go"),
    "sequence mean": Estimator(aggregation="sequence_mean", ratio="sequence_mean"),
    "token mean": Estimator(aggregation="token_mean", ratio="token", returns="reward_to_go"),
    "fixed length": Estimator(aggregation="fixed_length"),
    "kl": Estimator(beta=0.3, kl_estimator="k2", kl_placement="loss"),
    "closed form": Estimator(beta=0.3, kl_estimator="closed_form", kl_placement="loss"),
    "closed form path": Estimator(beta=0.3, kl_estimator="closed_form_path", kl_placement="loss"),
    "kl in the reward": Estimator(beta=0.3),
    "entropy": Estimator(entropy_coef=0.2, aggregation="token_mean"),
}


def policy_of(family, seed=0):
    """A policy in float64 whose turns are short."""
    policy = make_policy(dtype="float64", seed=seed, max_position_embeddings=128)
    if family == "qwen3":
        policy.model = family_policy("qwen3", dtype="float64", seed=seed, vocabulary=96).model
    elif family != "llama":
        policy.model = make_policy(family, dtype="float64", seed=seed, n_positions=128).model
    policy.eos_ids = ENDS
    return policy


def loss_by_hand(policy, reference, rows, e):
    """The loss of a step: each row is scored by itself, as a whole and without padding."""
    logprobs, kl, entropy, returns, term = {}, {}, {}, {}, {}
    for i in rows.valid.nonzero().flatten().tolist():
        actions = rows.mask[i].nonzero().flatten().tolist()
        prompt = rows.prompt_ids[i][rows.prompt_mask[i]].tolist()
        ids = torch.tensor(prompt + rows.completion_ids[i][: actions[-1] + 1].tolist())
        before = torch.tensor([len(prompt) + t - 1 for t in actions])
        logp = policy.model(ids[None]).logits[0][before].log_softmax(-1)  # [actions, V]
        with torch.no_grad():
            ref = reference.model(ids[None]).logits[0][before].log_softmax(-1)
        chosen = ids[before + 1, None]
        logprobs[i] = logp.gather(1, chosen).squeeze(1)
        kl[i] = logprobs[i] - ref.gather(1, chosen).squeeze(1)
        entropy[i] = -(logp.exp() * logp).sum(-1)
        term[i] = kl[i] ** 2 / 2
        if e.kl_estimator.startswith("closed_form"):
            term[i] = (logp.exp() * (logp - ref)).sum(-1)
        if e.kl_estimator == "closed_form_path":
            later = [term[i][t + 1 :].sum().detach() for t in range(len(actions))]
            term[i] = term[i] + torch.stack(later) * logprobs[i]
        turns, rewards = rows.turns[i][actions], rows.turn_rewards[i].to(logp)
        assert not rewards[~rows.mask[i]].any()
        rewards = rewards[actions] - (e.beta * kl[i].detach() if e.kl_placement == "reward" else 0)
        begins = [0] * len(turns)
        if e.returns != "total":
            begins = [int((turns == turn).nonzero().min()) for turn in turns]
        returns[i] = torch.stack([rewards[begin:].sum() for begin in begins])
    loss, count, tokens = 0.0, len(returns), sum(map(len, returns.values()))
    for i, logp in logprobs.items():
        divisors = {
            "sequence_mean": count * len(logp),
            "token_mean": tokens,
            "fixed_length": count * LIMIT,
        }
        others = [returns[j][0] for j in returns if j // SIZE == i // SIZE and j != i]
        gain = (returns[i] - sum(others) / len(others)) * logp + e.entropy_coef * entropy[i]
        gain = gain - (e.beta * term[i] if e.kl_placement == "loss" else 0)
        loss = loss - gain.sum() / divisors.get(e.aggregation, count)
    return loss


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [("llama", name, {}) for name in ESTIMATORS]
    + [("gpt2", "rloo", {}), ("qwen3", "token mean", {})]
    + [("llama", "to go", {"micro_batch_size": 5, "sampling_batch_size": 3})]
    + [("gpt2", "kl", {"micro_batch_size": 2}), ("llama", "to go", {"share_seed": False})]
    + [("llama", "token mean", {"factory": Faulty, "micro_batch_size": 1})]
    + [pytest.param("llama", "kl", {"factory": Faulty}, marks=pytest.mark.slow)]
)  # fmt: skip
def test_the_gradient_of_episodes_is_that_of_their_chosen_tokens(family, name, options):
    """Neither KL, entropy nor divisors have a token of the environment, nor anything a row that failed.

    Unsloth ignored the mask of tools.
    """
    options = dict(options)
    factory = options.pop("factory", Guess)
    share = options.pop("share_seed", True)
    rewards = Rewards([], environments=Environments(factory, share_seed=share, timeout=0.3))
    estimator = ESTIMATORS[name]
    policy = policy_of(family)
    reference = policy_of(family, seed=1)
    policy.reference = reference.model.requires_grad_(False)
    learner = make_learner(
        policy, estimator, max_completion_length=LIMIT, learning_rate=1e-9, **options
    )
    prompts = [(n, {"prompt": prompt}) for n, prompt in enumerate(PROMPTS)]
    rows = collect_rows(learner, rewards, prompts, replace(learner.sampling, step=1))
    behind = rows.mask.flip(1).cumsum(1).flip(1) > 0
    assert (~rows.mask & behind).sum() > 50 and int(rows.turns.max()) == 2
    assert rows.valid.all() == (factory is Guess)
    loss_by_hand(policy, reference, rows, estimator).backward()
    expected = gradient(policy.model)
    policy.model.zero_grad()
    record = one_step(learner, reward=rewards)
    assert record.metrics["reward"] == pytest.approx(float(rows.rewards[rows.valid].mean()))
    assert expected.norm() > 1e-3 and apart(gradient(policy.model), expected) < 1e-6
    entropies = rows.entropy[rows.mask]
    assert record.metrics["entropy"] == pytest.approx(float(entropies.mean()), rel=1e-6)
    assert record.metrics["completions/mean_length"] == float(rows.mask.sum()) / len(rows)
