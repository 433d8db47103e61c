"""The same lists for a causal language model: every completion of a prompt, scored by the training code."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused
from tokenrl.lab.exact.problems import Completions, Problem, all_completions
from tokenrl.language.policy.model import Policy
from tokenrl.language.rollout.rollout import Rollout, pad_left
from tokenrl.language.rollout.scoring import score

LIMIT = 5_000
"""Completions a prompt; each of their tokens costs a backward pass."""


def problem_of_policy(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    reward: Callable[[int, list[int]], float],
    *,
    length: int,
    group_size: int = 2,
    vocabulary: int,
    temperature: float = 1.0,
) -> Problem:
    """List every completion of a real model of tiny vocabulary, with scores by autograd, in float64.

    Args:
        policy: Its model in float64, so that the identities hold to rounding; its reference if it has one,
            else the model itself is the reference. The greedy completion is that of the highest chances
            token by token; the critic says 0 everywhere.
        prompts: Ids of each prompt.
        reward: Of (place of the prompt, ids of the completion with its end).
        length: The most tokens of a completion, its end included.
        group_size: Completions a prompt in one step.
        vocabulary: Rows of the model's output.
        temperature: That of the sampling.

    Raises:
        Refused: When there are too many completions to list, or the model is not in float64.
    """
    parameters = policy.trainable_parameters()
    _check(policy, vocabulary, length)
    every = all_completions(vocabulary, length, policy.eos_ids)
    rollouts = [rollout_of_all(policy, prompt, vocabulary=vocabulary, length=length) for prompt in prompts]
    logprobs, entropy, slopes = [], [], []
    for rollout in rollouts:
        scores = score(
            policy.model, rollout, temperature=temperature, share_prompt=policy.share_prompt, entropy=True
        )
        assert scores.entropy is not None
        logprobs.append(scores.logprobs * every.mask)
        entropy.append(scores.entropy * every.mask)
        slopes.append([_slopes(q, parameters) for q in (logprobs[-1], entropy[-1])])
    with torch.no_grad():
        chosen = torch.stack(logprobs).detach()
        reference = policy.model if policy.reference is None else policy.reference
        ref = [score(reference, r, temperature=temperature).logprobs * every.mask for r in rollouts]
    keep = every.mask.bool()
    lists = [ids[m].tolist() for ids, m in zip(every.ids, keep, strict=True)]
    return Problem(
        name=f"{len(prompts)} prompts of {policy.source or 'a model'}, groups of {group_size}",
        group_size=group_size,
        mask=every.mask,
        truncated=rollouts[0].truncated,
        logprobs=chosen,
        ref_logprobs=torch.stack(ref),
        entropy=torch.stack(entropy).detach(),
        rewards=torch.tensor(
            [[reward(x, y) for y in lists] for x in range(len(prompts))], dtype=torch.double
        ),
        scores=torch.stack([s[0] for s in slopes]),
        entropy_slopes=torch.stack([s[1] for s in slopes]),
        values=torch.zeros_like(chosen),
        greedy=torch.stack([_greedy(x, every) for x in chosen]),
        max_length=length,
    )


def _check(policy: Policy, vocabulary: int, length: int) -> None:
    going_on = vocabulary - len(policy.eos_ids)
    if going_on ** (length - 1) * vocabulary > LIMIT:
        raise Refused(
            f"A vocabulary of {vocabulary} with completions of up to {length} tokens gives more than {LIMIT} "
            "completions to list. Give a smaller length, or a model of smaller vocabulary."
        )
    if any(p.dtype != torch.float64 for p in policy.trainable_parameters()):
        raise Refused(
            "The model is not in float64, and rounding would look like bias. Load it with dtype 'float64'."
        )


def rollout_of_all(policy: Policy, prompt: Sequence[int], *, vocabulary: int, length: int) -> Rollout:
    """All completions of one prompt, as if each had been sampled once; its logprobs are not filled in."""
    every = all_completions(vocabulary, length, policy.eos_ids)
    prompt_ids, prompt_mask = pad_left([prompt], policy.pad_id, policy.device)
    nothing = torch.zeros(every.mask.shape, dtype=torch.double)
    last = every.ids.gather(1, every.last).squeeze(1)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=torch.zeros(len(every.ids), dtype=torch.long),
        completion_ids=every.ids,
        mask=every.mask.bool(),
        logprobs=nothing,
        truncated=~torch.isin(last, torch.tensor(policy.eos_ids)),
    )


def _slopes(quantity: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Gradient [M, T, D] of each entry of [M, T], one backward pass an entry."""
    rows = []
    for entry in quantity.flatten():
        parts = torch.autograd.grad(entry, list(parameters), retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).reshape(*quantity.shape, -1)


def _greedy(logprobs: Tensor, every: Completions) -> Tensor:
    """The completion of most probable tokens, from logprobs [M, T] of every token of every prefix."""
    prefix: tuple[int, ...] = ()
    while True:
        t = len(prefix)
        here = (every.prefix[:, t] == every.prefixes.index(prefix)) & (every.mask[:, t] > 0)
        best = int(logprobs[:, t].masked_fill(~here, -torch.inf).argmax())
        prefix = (*prefix, int(every.ids[best, t]))
        if prefix not in every.prefixes:
            return torch.tensor(best)
