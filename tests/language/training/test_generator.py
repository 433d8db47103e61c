"""Any generator trains every preset: what it does not return comes from a scoring pass."""

import dataclasses

import pytest
import torch
from refusals import refused
from tiny_models import (
    PROMPTS,
    Engine,
    alone,
    apart,
    gradient,
    letters_trained,
    make_policy,
    make_task,
    preset_for_groups_of_three,
    stepped,
    weights,
)

from tokenrl.core.estimator import Estimator
from tokenrl.core.presets import PRESETS

DIFFERENT = {"rloo", "remax", "optimal", "dapo", "gspo", "ppo"}
"""Presets that need something of the engine that the others do not, or that take it elsewhere."""


@pytest.mark.parametrize(
    ("preset", "architecture", "dtype", "tolerance"),
    [
        *((preset, "llama", "float32", 1e-6) for preset in ("ppo", "optimal")),
        *(
            pytest.param(
                preset,
                "gpt2",
                "float64",
                1e-10,
                marks=[pytest.mark.slow] * (preset not in DIFFERENT),
            )
            for preset in PRESETS
        ),
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
        sampling = dataclasses.replace(sampling, top_k=5)
        rollout = super().generate(prompt_ids, sampling, draws)
        noise = self.noise * torch.randn_like(rollout.sampling_logprobs) * rollout.mask
        reported = rollout.sampling_logprobs + noise
        self.rollout = dataclasses.replace(rollout, sampling_logprobs=reported)
        return self.rollout


class Noisy(Different):
    noise = 0.5


@pytest.mark.parametrize(
    ("placement", "engines"), [("reward", (Different, Noisy)), ("loss", (None, Gapped))]
)
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


def test_the_centres_are_those_of_the_samplers_distribution():
    """Beside the textbook, in which each row is scored alone."""
    options = {"dtype": "float64", "reward": lengthy, "micro_batch_size": 4, "engine": Different}
    estimator = Estimator(baseline="none", importance_centre=True)
    slope, _, learner = stepped(estimator, **options)
    policy = make_policy(dtype="float64", initializer_range=0.1)
    rollout = learner.generator.rollout
    ids = [
        ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.mask, strict=True)
    ]
    total = 0.0
    for row, (reward, chosen) in enumerate(zip(lengthy(ids), ids, strict=True)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        logits = policy.model(torch.tensor([[*prompt, *chosen]])).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)
        mu = rollout.sampling_distribution[row][rollout.mask[row]].exp()
        assert (mu > 0).sum() == 5 * len(chosen)
        of_chosen = logp[range(len(chosen)), chosen]
        total = total - reward * (of_chosen - (mu * logp).sum(1)).sum() / len(ids)
    total.backward()
    assert apart(slope, gradient(policy.model)) < 1e-6
    assert apart(slope, stepped(Estimator(baseline="none"), **options)[0]) > 0.1


def test_centring_is_refused_for_a_large_vocabulary(monkeypatch):
    monkeypatch.setattr("tokenrl.language.training.engines.MOST_TOKENS", 95)
    with refused("of 96 tokens at each position.*up to 95 tokens. Set importance_centre"):
        stepped(Estimator(importance_centre=True))


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_the_metrics_say_how_far_the_sampler_is_off(micro_batch_size):
    """Against the log-probabilities of each completion by a pass of its own."""
    options = {"dtype": "float64", "reward": lengthy, "micro_batch_size": micro_batch_size}
    _, record, learner = stepped(Estimator(), architecture="gpt2", engine=Different, **options)
    policy = make_policy("gpt2", dtype="float64", initializer_range=0.1)
    rollout = learner.generator.rollout
    with torch.no_grad():
        logprobs, _ = alone(policy.model, [*map(policy.encode, PROMPTS)], rollout)
    ratios = (logprobs - rollout.sampling_logprobs[rollout.mask]).split(
        rollout.mask.sum(1).tolist()
    )
    sizes = torch.cat(ratios).abs()
    weights = torch.stack([ratio.sum().exp() for ratio in ratios])
    expected = {
        "logp_difference/mean": sizes.mean(),
        "logp_difference/max": sizes.max(),
        "effective_sample_size": weights.mean() ** 2 / (weights**2).mean(),
        "kept_mass": weights.mean(),
    }
    for name, value in expected.items():
        assert record.metrics[f"sampling/{name}"] == pytest.approx(value.item(), rel=1e-4), name
    assert sizes.max() > 0.1 and len({*map(len, ratios)}) > 1


@pytest.mark.parametrize("kind", [Engine, Gapped])
def test_a_run_samples_everything_by_its_generator_and_warns_of_a_different_one(
    tmp_path, said, kind
):
    made = []

    def engine(policy, *_):
        made.append(kind(policy))
        return made[-1]

    policy = make_policy()
    options = {"model": policy, "prompts_per_step": 2, "max_steps": 2}
    letters_trained(tmp_path, make_task(), generator=engine, eval_every=0, quiet=False, **options)
    warning = "step 1: Log-probabilities of sampling and training differ by 0.3 nats per token"
    assert said().count(warning) == (kind is Gapped)
    # Two evaluations (greedy and sampled) of two prompts each, two steps.
    assert made[0].prompts == 2 * 2 * 2 + 2 * 2
    assert made[0].synced == 3 and made[0].closed  # the starting weights, and those of two steps
    assert torch.equal(weights(made[0].policy.model), weights(policy.model))
