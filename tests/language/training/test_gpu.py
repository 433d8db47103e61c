"""What runs differently on a GPU does what a processor does; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ENDS, PROMPTS, apart, completions, gradient, make_policy, make_task
from torch.testing import assert_close

from tokenrl import train
from tokenrl.language.rollout.forward import Forward, half_copy, with_attention
from tokenrl.language.rollout.scoring import Regime, score

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def on(device: str, **config):
    policy = make_policy(initializer_range=0.1, **config)
    policy.eos_ids = ENDS
    policy.model.to(device)
    return policy


def sampled(policy):
    settings = {"num_generations": 3, "max_completion_length": 6, "seed": 1}
    return completions(policy, [policy.encode(p) for p in PROMPTS], **settings)


def test_sampling_draws_the_same_tokens():
    here, there = (sampled(on(device)) for device in ("cpu", "cuda"))
    assert torch.equal(here.completion_ids, there.completion_ids.cpu())
    assert_close(here.logprobs, there.logprobs.cpu(), atol=1e-4, rtol=0)


def total(scores, rollout):
    """The sum of the log-probabilities of actions; what stands at padding has no meaning."""
    return scores.logprobs[rollout.mask.to(scores.logprobs.device)].sum()


@pytest.mark.parametrize("regime", ["plain", "chunks", "eager", "half"])
def test_the_gradient_is_that_of_a_processor(regime):
    here, there = on("cpu"), on("cuda")
    total(score(here.model, sampled(here)), sampled(here)).backward()
    model, regime = there.model, Regime()
    if regime == "chunks":
        regime = Regime(tokens_at_once=5)
    if regime == "eager":
        model = with_attention(model, "eager")
    if regime == "half":
        copied, copies = half_copy(there)
        model = copied.model
        half = Forward(policy=copied, model=model, copies=copies)
    total(score(model, sampled(there), regime), sampled(there)).backward()
    if regime == "half":
        half.accumulate_gradients()
    assert apart(gradient(there.model).cpu(), gradient(here.model)) < (
        0.05 if regime == "half" else 1e-3
    )


@pytest.mark.parametrize(
    "options", [{}, {"lora_r": 2}, {"mixed_precision": "no"}, {"estimator": "ppo"}]
)
def test_a_run_computes_in_bfloat16_unless_told_otherwise(options, tmp_path):
    shape = {
        "max_steps": 2,
        "prompts_per_step": 2,
        "num_generations": 2,
        "max_completion_length": 6,
    }
    result = train(
        model=make_policy(), task=make_task(), output_dir=tmp_path, quiet=True, **shape, **options
    )
    assert result.exit_code == 0 and result.policy.device.type == "cuda"
