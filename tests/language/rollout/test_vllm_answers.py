"""What is read of vLLM's answers, which an engine in its place gives in their form."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PROMPTS, make_policy

from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.language.rollout.vllm import VllmGenerator


class Flat:
    """Log-probabilities of a completion: at each position the sampled token, then the most probable ones."""

    def __init__(self, chosen: torch.Tensor, logp: torch.Tensor, listed: int) -> None:
        top = logp.topk(listed)
        ids = torch.cat([chosen[:, None], top.indices], dim=1)
        self.token_ids = ids.flatten().tolist()
        self.logprobs = logp.gather(1, ids).flatten().tolist()
        self.start_indices = list(range(0, ids.numel(), listed + 1))

    def __len__(self) -> int:
        return len(self.start_indices)


class Answering:
    """Answers with completions that were sampled before, and remembers what it was asked for."""

    model_config = SimpleNamespace(max_model_len=1000)

    def __init__(self, rollout) -> None:
        self.rollout = rollout

    def generate(self, requests, parameters, use_tqdm):
        self.asked = parameters
        answers = []
        for row, request in enumerate(requests):
            prompt = self.rollout.prompt_ids[row][self.rollout.prompt_mask[row]]
            assert request["prompt_token_ids"] == prompt.tolist()
            mask = self.rollout.mask[row]
            chosen = self.rollout.completion_ids[row][mask]
            logp = self.rollout.sampling_distribution[row][mask][
                ..., 1
            ]  # in the order of the vocabulary
            reason = "length" if self.rollout.truncated[row] else "stop"
            completion = SimpleNamespace(
                token_ids=chosen.tolist(),
                finish_reason=reason,
                logprobs=Flat(chosen, logp, parameters[row].logprobs),
            )
            answers.append(SimpleNamespace(outputs=[completion]))
        return answers


@pytest.mark.parametrize(
    ("keep", "listed"),
    [
        ({}, 0),
        ({"keep_tokens": 3}, 3),
        ({"keep_tokens": 500}, 96),
    ],
)
def test_the_tokens_that_are_asked_for_are_those_that_are_read(monkeypatch, keep, listed):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    policy = make_policy(initializer_range=0.1)
    ids = [policy.encode(prompt) for prompt in PROMPTS[:2]]
    sampling = Sampling(6, 3, step=1, top_k=5, keep_tokens=96)
    draws = uniforms("training", sampling, range(2))
    engine = Answering(TransformersGenerator(policy).generate(ids, sampling, draws))
    sampling = Sampling(6, 3, step=1, top_k=5, **keep)
    expected = TransformersGenerator(policy).generate(ids, sampling, draws)
    rollout = VllmGenerator(policy, engine).generate(ids, sampling, draws)
    assert {parameters.logprobs for parameters in engine.asked} == {listed}
    for name in ("completion_ids", "mask", "truncated", "sampling_logprobs"):
        torch.testing.assert_close(getattr(rollout, name), getattr(expected, name))
    if not keep:
        assert rollout.sampling_distribution is expected.sampling_distribution is None
        return
    columns = rollout.sampling_distribution, expected.sampling_distribution
    ordered = [x.gather(2, x[..., :1].argsort(2).expand(x.shape)) for x in columns]  # by ids
    torch.testing.assert_close(*ordered)
