"""Makes a `Problem` of a causal language model with a tiny vocabulary: its table of logits, in its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenrl.lab.exact.problems import Problem, all_completions, tabular_problem
from tokenrl.language.policy.model import Policy


def problem_of_policy(
    policy: Policy,
    prompt: Sequence[int],
    reward: Callable[[int, list[int]], float],
    *,
    length: int,
    vocabulary: int,
) -> Problem:
    """List every completion of a prompt, with scores in the weights by autograd, in float64.

    Args:
        policy: A policy whose model is in float64, so that identities hold up to rounding. Its reference
            model is used if it has one, and otherwise the model itself.
        prompt: Token ids.
        reward: Function of the number of the prompt, 0, and the ids of the completion, its end included.
        length: Largest number of tokens of a completion, its end included.
        vocabulary: Number of tokens in the model's output.

    Returns:
        The problem with all completions; the critic's values are 0.
    """
    rows = all_completions(vocabulary, length, policy.eos_ids)

    def table_of(model: torch.nn.Module) -> Tensor:
        """The logits of the next token after each prefix [S, V]."""
        texts = [torch.tensor([[*prompt, *prefix]]) for prefix in rows.prefixes]
        return torch.stack([model(text).logits[0, -1] for text in texts])

    logits = table_of(policy.model)
    parameters = policy.trainable_parameters()
    slopes = [
        torch.cat([x.flatten() for x in torch.autograd.grad(y, parameters, retain_graph=True)])
        for y in logits.flatten()
    ]
    tables = {"logits": logits.detach(), "reference": logits.detach()}
    if policy.reference is not None:
        with torch.no_grad():
            tables["reference"] = table_of(policy.reference)
    problem = tabular_problem(0, length=length, vocabulary=vocabulary, rows=rows, **tables)
    of_weights = {
        name: getattr(problem, name) @ torch.stack(slopes)
        for name in ("scores", "entropy_slopes", "kl_slopes")
    }
    texts = [ids[mask > 0].tolist() for ids, mask in zip(rows.ids, rows.mask, strict=True)]
    rewards = torch.tensor([[reward(0, ids) for ids in texts]], dtype=torch.double)
    values = torch.zeros_like(problem.values)
    return replace(problem, rewards=rewards, values=values, max_length=length, **of_weights)
