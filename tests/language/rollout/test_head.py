"""Scoring some tokens at a time gives the values and gradients of all logits at once, which never exist."""

import pytest
import torch
from tiny_models import (
    ARCHITECTURES,
    ENDS,
    PROMPTS,
    apart,
    completions,
    gradient,
    make_policy,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tokenrl.language.policy.model import add_lora
from tokenrl.language.rollout.agreement import check_model
from tokenrl.language.rollout.distribution import Distribution
from tokenrl.language.rollout.head import head_of
from tokenrl.language.rollout.sampling import UNIFORM_BITS, draw, on_device
from tokenrl.language.rollout.scoring import Regime, score, score_in_parts

TRUNCATED = Distribution(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02)


def rollout_of(policy, length=6, prompts=PROMPTS, **how):
    policy.eos_ids = ENDS
    how = {"num_generations": 3, "temperature": 0.7, "seed": 1} | how
    ids = [policy.encode(prompt) for prompt in prompts]
    return completions(policy, ids, max_completion_length=length, **how)


def objective(policy, rollout, distribution=TRUNCATED.whole, **how):
    """The gradient of a weighted sum of all scores that have one, and all scores of the actions."""
    policy.model.zero_grad()
    options = {"distribution": distribution, "entropy": True, "score_norms": True}
    if policy.reference is not None:
        scored = score_in_parts(policy.reference, rollout, Regime(**how), states=True)
        is_whole = "tokens_at_once" not in how
        head = torch.nn.Identity() if is_whole else head_of(policy.reference)
        options["reference"] = scored.states, head
    scores = score(policy.model, rollout, Regime(**how), **options)
    weights = torch.linspace(-1, 2, len(rollout.mask), dtype=scores.logprobs.dtype)[:, None]
    total = scores.logprobs * weights + 0.1 * scores.entropy
    columns = [scores.logprobs, scores.entropy, scores.score_norms]
    if scores.token_kl is not None:
        total = total + weights * scores.token_kl
        columns.append(scores.token_kl)
    torch.where(rollout.mask, total, 0).sum().backward()
    values = torch.stack([x.detach()[rollout.mask] for x in columns])
    return gradient(policy.model), values


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance", "share", "length"),
    [
        *((architecture, "float64", 1e-13, True, 6) for architecture in ARCHITECTURES),
        ("llama", "float64", 1e-13, False, 6),
        ("qwen2", "float32", 1e-5, True, 2),
        ("gpt2", "bfloat16", 0.02, True, 6),
    ],
)
def test_some_tokens_at_a_time_are_all_at_once(architecture, dtype, tolerance, share, length):
    policy = make_policy(architecture, dtype=dtype)
    rollout = rollout_of(policy, length)
    policy.reference = make_policy(architecture, dtype=dtype, seed=1).model
    # bfloat16 rounds other logits below the bound in either way of computing them
    how = {
        "share_prompt": share,
        "distribution": TRUNCATED if tolerance < 0.01 else TRUNCATED.whole,
    }
    expected, values = objective(policy, rollout, **how)
    for at_once in (1, 7, int(rollout.mask.sum()) - 1):
        found, same = objective(policy, rollout, tokens_at_once=at_once, **how)
        assert apart(found, expected) < tolerance
        assert float((same - values).norm() / values.norm()) < tolerance


def test_a_frozen_head_gets_no_gradient():
    policy = make_policy()
    add_lora(policy, r=2)
    rollout = rollout_of(policy)
    expected, _ = objective(policy, rollout)
    found, _ = objective(policy, rollout, tokens_at_once=3)
    assert apart(found, expected) < 1e-5
    head = head_of(policy.model)
    assert head is not None and head.weight.grad is None


def test_an_adapted_head_is_left_to_the_forward_pass():
    policy = make_policy()
    add_lora(policy, r=2, target_modules=["lm_head"])
    regime = check_model(policy)
    assert regime.tokens_at_once is None and "no linear layer" in regime.remarks["logits"]


class _Largest(TorchDispatchMode):
    """Notes the most entries of any tensor that is computed."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.most = max([self.most, *sizes])
        return found


def test_logits_of_all_tokens_never_exist():
    policy = make_policy(vocabulary=20_000)
    rollout = rollout_of(policy)
    # gradients of weights are as large as these
    size = policy.model.get_input_embeddings().weight.numel()
    tokens, at_once, how = int(rollout.mask.sum()), 8, Regime(tokens_at_once=8)
    assert tokens > 3 * at_once
    with _Largest() as seen:
        score(policy.model, rollout, how, entropy=True).logprobs.sum().backward()
        score_in_parts(policy.model, rollout, how, entropy=True)
    assert seen.most == max(size, at_once * 20_000)
    with _Largest() as seen:
        objective(policy, rollout)
    assert seen.most >= tokens * 20_000


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("vocabulary", [5, 200, 1000])
def test_a_token_is_drawn_where_the_cdf_reaches_its_uniform(vocabulary, device):
    """In one step or two, in float64 or, as on a device without it, in whole numbers."""
    torch.manual_seed(0)
    p = torch.softmax(4 * torch.randn(4000, vocabulary), dim=1)
    p[:, ::7] = 0
    p[:, 512:768] = 0  # a block in which nothing is possible
    p[:, vocabulary // 2 :] *= 1e-9  # most of the weight lies in the first half
    p /= p.sum(dim=1, keepdim=True)
    uniforms = torch.rand(4000, dtype=torch.double)
    uniforms[:4] = torch.tensor([0.0, 1 - 2**-53, 0.5, 1e-300])
    numbers = uniforms
    if device == "meta":  # as of any device other than the CPU
        numbers = (uniforms * 2**UNIFORM_BITS).long()
    assert on_device(uniforms, torch.device(device)).dtype == numbers.dtype
    tokens = draw(p, numbers)[:, None]
    assert (p.gather(1, tokens) > 0).all()
    # Near a boundary rounding may choose the other side, which is as near.
    end = p.double().cumsum(dim=1).gather(1, tokens).squeeze(1)
    start = end - p.gather(1, tokens).squeeze(1)
    assert ((start - 1e-5 <= uniforms) & (uniforms <= end + 1e-5)).all()
