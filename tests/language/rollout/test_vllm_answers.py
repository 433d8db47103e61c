"""What is read of vLLM's answers, which an engine in its place gives in their form."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PROMPTS, make_policy

from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.language.rollout.vllm import VllmGenerator


class Flat(SimpleNamespace):
    """Log-probabilities of a completion: at each position the sampled token, then the most probable ones."""

    def __len__(self) -> int:
        return len(self.start_indices)


class Answering:
    """Answers with completions that were sampled before, and remembers what it was asked for."""

    model_config = SimpleNamespace(max_model_len=1000)

    def __init__(self, rollout) -> None:
        self.rollout = rollout

    def generate(self, requests, parameters, use_tqdm):
        self.asked = parameters
        rollout, answers = self.rollout, []
        for row, request in enumerate(requests):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
            assert request["prompt_token_ids"] == prompt.tolist()
            mask = rollout.mask[row]
            chosen = rollout.completion_ids[row][mask]
            logp = rollout.sampling_distribution[row][mask][..., 1]  # in the vocabulary's order
            top = logp.topk(parameters[row].logprobs).indices
            ids = torch.cat([chosen[:, None], top], dim=1)
            logprobs = Flat(
                token_ids=ids.flatten().tolist(),
                logprobs=logp.gather(1, ids).flatten().tolist(),
                start_indices=list(range(0, ids.numel(), ids.shape[1])),
            )
            reason = "length" if rollout.truncated[row] else "stop"
            completion = {"token_ids": chosen.tolist(), "finish_reason": reason}
            completion = SimpleNamespace(**completion, logprobs=logprobs)
            answers.append(SimpleNamespace(outputs=[completion]))
        return answers


@pytest.mark.parametrize(("keep", "listed"), [(0, 0), (3, 3), (500, 96)])
def test_the_tokens_that_are_asked_for_are_those_that_are_read(monkeypatch, keep, listed):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    policy = make_policy(initializer_range=0.1)
    ids = [policy.encode(prompt) for prompt in PROMPTS[:2]]
    sampling = Sampling(6, 3, step=1, top_k=5, keep_tokens=keep)
    draws = uniforms("training", sampling, range(2))
    sampler = TransformersGenerator(policy)
    engine = Answering(sampler.generate(ids, replace(sampling, keep_tokens=96), draws))
    expected = sampler.generate(ids, sampling, draws)
    rollout = VllmGenerator(policy, engine).generate(ids, sampling, draws)
    assert {parameters.logprobs for parameters in engine.asked} == {listed}
    for name in ("completion_ids", "mask", "truncated", "sampling_logprobs"):
        torch.testing.assert_close(getattr(rollout, name), getattr(expected, name))
    columns = [x.sampling_distribution for x in (rollout, expected)]
    if keep:
        columns = [x.gather(2, x[..., :1].argsort(2).expand(x.shape)) for x in columns]  # by ids
        torch.testing.assert_close(*columns)
    else:
        assert columns == [None, None]
