"""Makes the table of a step's completions, with what each token of some of them carried.

For people: the columns `tokens/...` hold a list for each of these completions, with an entry for each token, those
that an environment wrote included. The report, `tokenrl.read_run(...).tokens()` and `result.tokens()` show them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenrl.core.rows import LossTerms
from tokenrl.language.policy.stops import pieces, special_tokens
from tokenrl.language.rollout.rewarded import Rewarded, completion_rows
from tokenrl.language.rollout.rollout import Rollout, lengths, to_host
from tokenrl.language.rollout.scoring import Scores
from tokenrl.language.training.experience import Experience
from tokenrl.language.training.rows import loss_inputs, update_weights
from tokenrl.runs.processes import local

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.training.learner import Learner

_FIRST, _HEAVIEST = 3, 5
"""Completions whose tokens are kept: the first of so many groups, and so many others with the largest weights."""


def step_table(
    learner: Learner,
    rewarded: Rewarded,
    rows: Experience,
    terms: LossTerms,
    names: Sequence[str],
    scored: Sequence[Sequence[tuple[Tensor, Tensor]]],
) -> list[dict[str, Any]]:
    """Return this process's completions of a step as rows of a table; see `completion_rows` and `token_lists`.

    Where each token has an advantage of its own, the row holds that of the first token.

    Args:
        learner: the settings.
        rewarded: this process's n rows.
        rows: the same rows, as they were learnt from.
        terms: the advantages of all N rows.
        names: names of the reward functions.
        scored: for each update the numbers of the rows of its micro-batches [n'], and their log-probabilities
            under the policy before it [n', T'].
    """
    advantages = local(learner.accelerator, terms.advantages)
    weights = gradient_weights(learner, rows, terms)
    of_rows = advantages.reshape(len(rows), -1)[:, 0]
    table = completion_rows(learner.policy, rewarded, names, of_rows, rows.teacher_prompts)
    numbers = {"logprob": rows.logprobs, "entropy": rows.entropy, "weight": weights}
    if rows.ref_logprobs is not None:
        of_teacher = learner.args.teacher is not None
        numbers["teacher" if of_teacher else "reference"] = rows.ref_logprobs
    if rows.old_logprobs is not None:
        latest = rows.old_logprobs.clone()
        parts = [*chain(*scored)]
        for (index, _), logprobs in zip(parts, to_host(x for _, x in parts), strict=True):
            latest[index, : logprobs.shape[1]] = logprobs.to(latest)
        numbers["ratio"] = (latest - rows.old_logprobs).exp()
    firsts = torch.arange(len(table))[:: learner.group_size][:_FIRST]
    sizes = (weights[:, : rows.mask.shape[1]] * rows.mask).abs().sum(dim=1)
    sizes[firsts] = -1
    heaviest = sizes.argsort(descending=True, stable=True)[:_HEAVIEST]
    chosen = torch.cat([firsts, heaviest]).unique().tolist()
    lists = token_lists(learner.policy, rewarded, numbers, chosen)
    for index, columns in zip(chosen, lists, strict=True):
        table[index] |= columns
    # Other rows stand where no completion was left to be replayed.
    counts = (rewarded.valid | ~rewarded.replayed).tolist()
    return [row for row, is_counted in zip(table, counts, strict=True) if is_counted]


def gradient_weights(learner: Learner, rows: Experience, terms: LossTerms) -> Tensor:
    """Return the weight of each token's score in the gradient of a step, times the N rows of the step [n, T].

    It is the derivative of the loss itself by the log-probability of the token, before the first update and as
    if that learnt from all rows. Where a row counts as the sum of its tokens it is the advantage, times what
    importance weights and weights of prompts make of it; and a KL that is estimated from the tokens is in it. Terms
    of the loss that do not depend on which token was sampled, as the entropy, are not.

    Args:
        learner: the estimator.
        rows: this process's n rows.
        terms: the terms of all N rows.
    """
    weights = update_weights(learner, terms, torch.ones_like(terms.in_divisor))
    advantages, weights = (local(learner.accelerator, x) for x in (terms.advantages, weights))
    logprobs = rows.logprobs.clone().requires_grad_()
    others = torch.zeros_like(rows.logprobs)
    scores = Scores(logprobs, entropy=rows.entropy, centres=others, token_kl=others)
    loss = learner.estimator.loss(**loss_inputs(rows, scores, advantages, weights))
    return -len(terms.in_divisor) * torch.autograd.grad(loss, logprobs)[0]


def token_lists(
    policy: Policy, rows: Rollout, numbers: Mapping[str, Tensor], chosen: Sequence[int]
) -> list[dict[str, Any]]:
    """Return lists with an entry for each token of chosen completions, by the names of their columns.

    Args:
        policy: has the tokenizer.
        rows: the N rows.
        numbers: numbers of the actions, each [N, T] or wider.
        chosen: the numbers of n rows.

    Returns:
        For each of these rows `tokens/text`; `tokens/special`, True on special tokens; and the numbers as
        `tokens/NAME` in float32, NaN on the tokens of an environment, which are no actions.
    """
    special_ids = torch.tensor([*special_tokens(policy.tokenizer)], dtype=torch.int64)
    lists = []
    for index, length in zip(chosen, lengths(rows.mask)[chosen].tolist(), strict=True):
        ids = rows.completion_ids[index, :length]
        is_action = rows.mask[index, :length]
        columns: dict[str, Any] = {
            "tokens/text": pieces(policy.tokenizer, ids.tolist()),
            "tokens/special": torch.isin(ids, special_ids).numpy(),
        }
        for name, values in numbers.items():
            of_row = values[index, :length].float()
            columns[f"tokens/{name}"] = of_row.masked_fill(~is_action, torch.nan).numpy()
        lists.append(columns)
    return lists
