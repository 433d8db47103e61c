"""What is read of vLLM's answers, which an engine in its place gives in their form."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import torch
from tiny_models import PROMPTS, make_policy

from tokenrl.language.rollout.generator import TransformersGenerator
from tokenrl.language.rollout.sampling import Sampling, uniforms
from tokenrl.language.rollout.vllm import VllmGenerator


class Flat(SimpleNamespace):
    """Log-probabilities of a completion: at each position the sampled token, and then another one."""

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
            logp = rollout.sampling_logprobs[row][mask]
            both = torch.stack([logp, torch.zeros_like(logp)], dim=1)
            logprobs = Flat(
                logprobs=both.flatten().tolist(), start_indices=list(range(0, both.numel(), 2))
            )
            reason = "length" if rollout.truncated[row] else "stop"
            completion = {"token_ids": chosen.tolist(), "finish_reason": reason}
            completion = SimpleNamespace(**completion, logprobs=logprobs)
            answers.append(SimpleNamespace(outputs=[completion]))
        return answers


def test_the_log_probabilities_are_those_of_the_sampled_tokens(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    policy = make_policy(initializer_range=0.1)
    ids = [policy.encode(prompt) for prompt in PROMPTS[:2]]
    sampling = Sampling(6, 3, step=1, top_k=5)
    draws = uniforms("training", sampling, range(2))
    expected = TransformersGenerator(policy).generate(ids, sampling, draws)
    engine = Answering(expected)
    rollout = VllmGenerator(policy, engine).generate(ids, sampling, draws)
    assert {parameters.logprobs for parameters in engine.asked} == {0}
    for name in ("completion_ids", "mask", "truncated", "sampling_logprobs"):
        torch.testing.assert_close(getattr(rollout, name), getattr(expected, name))
