"""Makes a `Problem` of a causal language model: every completion is listed and scored by training's code."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tokenrl.lab.exact.problems import Completions, Problem, all_completions
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.agreement import check_scoring
from tokenrl.language.rollout.rollout import Rollout, pad_left
from tokenrl.language.rollout.scoring import Reference, score


def problem_of_policy(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[int, list[int]], float],
    *,
    length: int,
    group_size: int = 2,
    vocabulary: int,
) -> Problem:
    """List every completion of a real model with a tiny vocabulary, with scores by autograd, in float64.

    The values of the critic are 0. The greedy completion takes the most probable token at each position.

    Args:
        policy: A policy whose model is in float64, so that identities hold up to rounding. Its reference
            model is used if it has one, and otherwise the model itself.
        prompts: Token ids of each of the P prompts.
        reward: Function of the index of the prompt and the ids of the completion, its end included.
        length: Largest number of tokens of a completion, its end included.
        group_size: Completions per prompt in one step.
        vocabulary: Number of tokens in the model's output.

    Returns:
        The problem with all M completions of each prompt; D is the number of trainable parameters.
    """
    parameters = policy.trainable_parameters()
    scoring = check_scoring(policy)
    every = all_completions(vocabulary, length, policy.eos_ids)
    rollouts = [
        rollout_of_all(policy, prompt, vocabulary=vocabulary, length=length) for prompt in prompts
    ]
    reference = policy.model if policy.reference is None else policy.reference
    columns: list[list[Tensor]] = []
    slopes: list[list[Tensor]] = []
    for rollout in rollouts:
        frozen = Reference(lambda: contextlib.nullcontext(reference), scoring)
        scores = score(policy.model, rollout, scoring, entropy=True, reference=frozen)
        columns.append([x * every.mask for x in (scores.logprobs, scores.entropy, scores.token_kl)])
        slopes.append([_slopes(x, parameters) for x in columns[-1]])
    with torch.no_grad():
        chosen, entropy, token_kl = (torch.stack(x).detach() for x in zip(*columns, strict=True))
        ref = [score(reference, r, scoring).logprobs * every.mask for r in rollouts]
    keep = every.mask.bool()
    lists = [ids[m].tolist() for ids, m in zip(every.ids, keep, strict=True)]
    return Problem(
        name=f"{len(prompts)} prompts of {policy.source or 'a model'}, groups of {group_size}",
        group_size=group_size,
        mask=every.mask,
        truncated=rollouts[0].truncated,
        logprobs=chosen,
        ref_logprobs=torch.stack(ref),
        entropy=entropy,
        token_kl=token_kl,
        rewards=torch.tensor(
            [[reward(x, y) for y in lists] for x in range(len(prompts))], dtype=torch.double
        ),
        scores=torch.stack([s[0] for s in slopes]),
        entropy_slopes=torch.stack([s[1] for s in slopes]),
        kl_slopes=torch.stack([s[2] for s in slopes]),
        values=torch.zeros_like(chosen),
        greedy=torch.stack([_greedy(x, every) for x in chosen]),
        max_length=length,
    )


def rollout_of_all(
    policy: Policy, prompt: Sequence[int], *, vocabulary: int, length: int
) -> Rollout:
    """Return all completions of one prompt as if each had been sampled once; the logprobs are set to 0."""
    every = all_completions(vocabulary, length, policy.eos_ids)
    prompt_ids, prompt_mask = pad_left([prompt] * len(every.ids), policy.pad_id)
    nothing = torch.zeros(every.mask.shape, dtype=torch.double)
    last = every.ids.gather(1, every.last).squeeze(1)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=torch.zeros(len(every.ids), dtype=torch.long),
        completion_ids=every.ids,
        mask=every.mask.bool(),
        sampling_logprobs=nothing,
        truncated=~torch.isin(last, torch.tensor(policy.eos_ids)),
    )


def _slopes(quantity: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the gradient [M, T, D] of each entry of [M, T], with one backward pass per entry."""
    rows = []
    for entry in quantity.flatten():
        parts = torch.autograd.grad(
            entry, list(parameters), retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).reshape(*quantity.shape, -1)


def _greedy(logprobs: Tensor, every: Completions) -> Tensor:
    """Return the completion of the most probable tokens, from the logprobs [M, T] of all completions."""
    prefix: tuple[int, ...] = ()
    while True:
        t = len(prefix)
        here = (every.prefix[:, t] == every.prefixes.index(prefix)) & (every.mask[:, t] > 0)
        best = int(logprobs[:, t].masked_fill(~here, -torch.inf).argmax())
        prefix = (*prefix, int(every.ids[best, t]))
        if prefix not in every.prefixes:
            return torch.tensor(best)
