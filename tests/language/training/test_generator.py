"""Any generator trains every preset: what it does not return comes from a scoring pass."""

import dataclasses
import math

import pytest
import torch
from refusals import refused
from tiny_models import (
    Engine,
    apart,
    make_policy,
    make_task,
    preset_for_groups_of_three,
    stepped,
    weights,
)

import tokenrl
from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS

DIFFERENT = ("reinforce", "rloo", "remax", "optimal", "a2c", "grpo", "dapo", "gspo", "ppo")
"""Presets that need something of the engine that the others do not, or that take it elsewhere."""


@pytest.mark.parametrize(
    ("preset", "architecture", "dtype", "tolerance"),
    [
        pytest.param(preset, *values, marks=() if preset in presets else pytest.mark.slow)
        for *values, presets in (
            ("llama", "float32", 1e-6, ("ppo", "optimal")),
            ("gpt2", "float64", 1e-10, DIFFERENT),
        )
        for preset in PRESETS
    ],
)
def test_every_preset_trains_with_an_engine_that_returns_ids_and_logprobs_only(
    preset, architecture, dtype, tolerance
):
    options = {"architecture": architecture, "dtype": dtype, "micro_batch_size": 5}
    estimator = preset_for_groups_of_three(preset)
    if estimator.objective == "log_success":
        options["reward"] = lengthy
    slope, record, learner = stepped(estimator, **options)
    result, other, engine = stepped(estimator, engine=Engine, **options)
    assert slope.norm() > 0.01 and apart(result, slope) < tolerance
    assert apart(weights(engine.policy.model), weights(learner.policy.model)) < tolerance
    if learner.critic is not None:
        assert apart(weights(engine.critic.head), weights(learner.critic.head)) < tolerance
    assert other.metrics.keys() == record.metrics.keys()
    for name, value in record.metrics.items():
        assert other.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert engine.generator.synced == 1


class Gapped(Engine):
    gap = -0.3


class Different(Engine):
    """Samples from other weights, and only the five most probable tokens; reports them with noise."""

    noise = 0.0

    def __init__(self, policy):
        super().__init__(policy)
        torch.manual_seed(0)
        for weight in self.policy.model.parameters():
            weight.data += 0.02 * torch.randn_like(weight)

    def generate(self, prompt_ids, sampling, draws):
        sampling = dataclasses.replace(sampling, top_k=5, keep_tokens=sampling.keep_tokens or 96)
        rollout = super().generate(prompt_ids, sampling, draws)
        noise = self.noise * torch.randn_like(rollout.sampling_logprobs) * rollout.mask
        reported = rollout.sampling_logprobs + noise
        self.rollout = dataclasses.replace(rollout, sampling_logprobs=reported)
        return self.rollout


class Noisy(Different):
    noise = 0.5


@pytest.mark.parametrize("engines", [(None, Gapped), (Different, Noisy)])
@pytest.mark.parametrize("placement", ["reward", "loss"])
def test_a_kl_is_that_of_the_policy_whatever_the_sampler_reports(placement, engines):
    estimator = Estimator(beta=0.3, kl_placement=placement)
    options = {"dtype": "float64", "top_p": 0.9}
    slope, record, _ = stepped(estimator, engine=engines[0], **options)
    other, same, _ = stepped(estimator, engine=engines[1], **options)
    assert abs(record.metrics["kl"]) > 0.01 and apart(other, slope) < 1e-6
    for name in ("kl", "kl_k3", "entropy"):
        assert same.metrics[name] == pytest.approx(record.metrics[name], rel=1e-5), name
    name = "sampling/logp_difference/mean"
    assert same.metrics[name] != pytest.approx(record.metrics[name], rel=1e-3)


def lengthy(completion_ids, **_):
    """Rewards of which no two are equal, so that each row is learnt from."""
    return [len(ids) + sum(ids) / 1000 + number / 7 for number, ids in enumerate(completion_ids)]


def by_hand(learner):
    """Of each completion that `Different` sampled: ids, log-probabilities [T, V] by a pass of its own, policy."""
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1)
    rollout = learner.generator.rollout
    rows = []
    for row, mask in enumerate(rollout.mask):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        chosen = rollout.completion_ids[row][mask]
        logits = policy.model(torch.cat([prompt, chosen])[None]).logits[0, len(prompt) - 1 : -1]
        rows.append((chosen, logits.log_softmax(-1)))
    return policy, rows


@pytest.mark.parametrize("top", [1, 4, 5, 200])
def test_the_centres_are_those_of_the_samplers_top_tokens(top):
    """Of five tokens that are drawn; with five or more kept, the gradient is that of all tokens."""
    options = {"dtype": "float64", "reward": lengthy, "micro_batch_size": 4, "engine": Different}
    capped = Estimator(importance="token", importance_cap=1.5, importance_centre=True)
    slope, _, learner = stepped(dataclasses.replace(capped, importance_centre_top=top), **options)
    rollout = learner.generator.rollout
    assert rollout.sampling_distribution.shape[2:] == (min(top, 96), 2)
    assert (apart(slope, stepped(capped, **options)[0]) < 1e-6) == (top >= 5)


def test_a_token_that_is_not_kept_any_more_leaves_the_loss_small():
    moving = {"top_k": 3, "num_iterations": 3, "learning_rate": 0.05, "max_grad_norm": 0.0}
    _, record, _ = stepped(Estimator(importance_centre=True, ratio="token"), **moving)
    assert abs(record.metrics["loss"]) < 100


def test_centring_is_refused_without_the_probabilities_of_all_tokens(monkeypatch):
    class Silent(Engine):
        def generate(self, *args):
            return dataclasses.replace(super().generate(*args), sampling_distribution=None)

    with refused("most probable tokens, and this generator returns none"):
        stepped(Estimator(importance_centre=True), engine=Silent)
    monkeypatch.setattr("tokenrl.language.training.engines.MOST_TOKENS", 10)
    for top in (None, 11):
        estimator = Estimator(importance_centre=True, importance_centre_top=top)
        kept = top or 96
        words = f"of {kept} tokens at each position.*up to 10 tokens. Set importance_centre_top"
        with refused(words):
            stepped(estimator)
    stepped(Estimator(importance_centre=True, importance_centre_top=10))


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_metrics_say_how_far_the_sampler_is_off(micro_batch_size):
    options = {"dtype": "float64", "reward": lengthy, "micro_batch_size": micro_batch_size}
    options["architecture"] = "gpt2"
    _, record, learner = stepped(Estimator(), engine=Different, **options)
    ratios = []
    for row, (chosen, logp) in enumerate(by_hand(learner)[1]):
        sampler = learner.generator.rollout.sampling_logprobs[row][: len(chosen)]
        ratios.append((logp.gather(1, chosen[:, None])[:, 0] - sampler).tolist())
    sizes = [abs(ratio) for row in ratios for ratio in row]
    weights = [math.exp(sum(row)) for row in ratios]
    expected = {
        "logp_difference/mean": sum(sizes) / len(sizes),
        "logp_difference/max": max(sizes),
        "effective_sample_size": sum(weights) ** 2 / len(weights) / sum(w**2 for w in weights),
        "kept_mass": sum(weights) / len(weights),
    }
    numbers = {name: record.metrics[f"sampling/{name}"] for name in expected}
    assert numbers == pytest.approx(expected, rel=1e-4)
    assert max(sizes) > 0.1 and len({len(row) for row in ratios}) > 1


@pytest.mark.parametrize("kind", [Engine, Gapped])
def test_a_run_samples_everything_by_its_generator_and_warns_of_a_different_one(
    tmp_path, said, kind
):
    made = []

    def engine(policy, *_):
        made.append(kind(policy))
        return made[-1]

    policy = make_policy()
    options = {"model": policy, "task": make_task(), "output_dir": tmp_path / "run", "max_steps": 2}
    options |= {"prompts_per_step": 2, "num_generations": 2, "eval_every": 0, "cpu": True}
    tokenrl.train(**options, generator=engine)
    warning = "step 1: Log-probabilities of sampling and training differ by 0.3 nats per token"
    assert said().count(warning) == (kind is Gapped)
    # Two evaluations (greedy and sampled) of two prompts each, two steps.
    assert made[0].prompts == 2 * 2 * 2 + 2 * 2
    assert made[0].synced == 3 and made[0].closed  # the starting weights, and those of two steps
    assert torch.equal(weights(made[0].policy.model), weights(policy.model))
