"""Reward of a policy on held-out prompts: of the greedy completion, and of sampled ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import RewardResult, Rewards
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.judged import judged
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.scoring import completed, score_in_parts
from tokenrl.language.training.evaluation_metrics import check_sizes, details
from tokenrl.language.training.kl_control import completion_kl

LOGITS = 2**26  # most logits at once when a reference scores completions: 256 MiB


class Evaluation(NamedTuple):
    """Numbers of one evaluation, and the greedy completions (of this process) for people to read."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


def evaluate_policy(
    policy: Policy,
    prompts: Sequence[Mapping[str, Any]],
    rewards: Rewards,
    sampling: Sampling,
    *,
    generator: Generator | None = None,
    batch_size: int = 256,
    accelerator: Any = None,
    detailed: bool = False,
    k: Sequence[int] = (),
    reference: Policy | None = None,
) -> Evaluation:
    """Evaluate on held-out prompts; several processes share them.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        sampling: how to sample; 0 generations evaluate the greedy completion only. Evaluations with the same
            seed share their random numbers, whatever the step.
        generator: what samples; None for the policy's own model.
        batch_size: completions in one batch; changes memory only.
        accelerator: accelerate's, in a run of several processes.
        detailed: also say what the same completions tell without further work; see `details`.
        k: with `detailed`, the sizes of its pass@k or best-of-k.
        reference: with `detailed`, a policy to which the sampled completions' KL is estimated; both at the
            temperature of sampling.

    Returns:
        `reward_greedy`, `reward` (sampled mean) with its standard error over prompts `reward_stderr`,
        `completions/mean_length` and `completions/clipped_ratio` of the sampled completions; and the details.

    Raises:
        Refused: no prompts, prompts too long, a k too large, or a reference of another vocabulary.
    """
    k = check_sizes(k, sampling.num_generations)
    if not prompts:
        raise Refused(
            "There are no prompts to evaluate on. Give an eval_split, or hold rows out with eval_size."
        )
    if reference is not None:
        longest = max(map(len, encode(policy, [row["prompt"] for row in prompts], sampling)))
        check_reference(policy, reference, longest, sampling)
    shared = {"generator": generator, "accelerator": accelerator, "batch_size": batch_size}
    passes: list[list[dict[str, Any]]] = []
    for generations in dict.fromkeys((0, sampling.num_generations)):
        rows: list[dict[str, Any]] = []
        how = replace(sampling, num_generations=generations)
        for places, rollout, result in judged(policy, prompts, rewards, how, stream="evaluation", **shared):
            known = completed(policy, rollout, sampling.temperature, entropy=True)
            kl = _kl(reference if generations else None, known, sampling.temperature)
            rows += _completions(policy, prompts, places, known, result, kl)
        everywhere = rows if accelerator is None else gather_object(rows)
        passes.append(sorted(everywhere, key=lambda row: row["place"]))
    metrics = _summary(passes)
    if detailed:
        metrics |= details(passes[0], passes[1] if len(passes) > 1 else [], rewards.names, k=k)
    return Evaluation(metrics, passes[0])


def check_reference(policy: Policy, reference: Policy, longest_prompt: int, sampling: Sampling) -> None:
    """Refuse a reference that cannot score the policy's completions.

    Args:
        policy: the policy that samples.
        reference: the policy that scores.
        longest_prompt: most tokens of a prompt.
        sampling: how completions are sampled.

    Raises:
        Refused: other tokens, a shorter context, or no samples to estimate a KL from.
    """
    longest = longest_prompt + sampling.max_completion_length
    rows = [p.model.get_input_embeddings().num_embeddings for p in (policy, reference)]  # type: ignore[operator]
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab() or rows[0] != rows[1]:
        raise Refused(
            f"The reference {reference.source!r} has another vocabulary than {policy.source!r}, so there is "
            "no KL between them. Give the model that training started from."
        )
    if reference.context is not None and longest > reference.context:
        raise Refused(
            f"Prompt and completion may have {longest} tokens, more than the context of "
            f"{reference.context} of the reference {reference.source!r}. Lower max_completion_length."
        )
    if not sampling.num_generations:
        raise Refused(
            "The KL to a reference is estimated from sampled completions, but num_generations=0 samples "
            "none. Give 1 or more, or no reference."
        )


def _kl(reference: Policy | None, rollout: Rollout, temperature: float) -> list[dict[str, float]]:
    """Both estimates of the KL of each completion; nothing of each without a reference."""
    n, width = rollout.mask.shape
    if reference is None:
        return [{}] * n
    vocabulary = reference.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    scored = score_in_parts(
        reference.model,
        rollout,
        rows_at_once=max(1, LOGITS // (width * vocabulary)),
        temperature=temperature,
        share_prompt=reference.share_prompt,
    ).logprobs
    each = {name: x.tolist() for name, x in completion_kl(rollout.logprobs, scored, rollout.mask).items()}
    return [{name: values[i] for name, values in each.items()} for i in range(n)]


def _completions(
    policy: Policy,
    prompts: Sequence[Mapping[str, Any]],
    places: Sequence[int],
    rollout: Rollout,
    result: RewardResult,
    kl: Sequence[Mapping[str, float]],
) -> list[dict[str, Any]]:
    """One row a completion; its reward is NaN where every reward function abstained."""
    texts = policy.decode(rollout.completion_ids, rollout.mask)
    lengths, truncated = rollout.mask.sum(dim=1).tolist(), rollout.truncated.tolist()
    assert rollout.entropy is not None
    ids, entropy = rollout.completion_ids.tolist(), rollout.entropy.sum(dim=1).tolist()
    return [
        {
            "place": places[prompt],
            "prompt": prompts[places[prompt]]["prompt"],
            "completion": texts[i],
            "reward": float(result.total[i]) if result.valid[i] else math.nan,
            "rewards": result.values[i].tolist(),
            "ids": ids[i][: lengths[i]],
            "entropy": entropy[i],
            "length": lengths[i],
            "truncated": truncated[i],
            **kl[i],
        }
        for i, prompt in enumerate(rollout.prompt_index.tolist())
    ]


def _summary(passes: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Means over completions; the standard error is that of the means of prompts."""
    table = [
        torch.tensor([[row[k] for k in ("reward", "length", "truncated", "place")] for row in rows]).double()
        for rows in passes
    ]
    metrics = {"reward_greedy": table[0][:, 0].nanmean()}
    reward, length, truncated, _ = table[-1].unbind(dim=1)
    if len(passes) > 1:
        metrics["reward"] = reward.nanmean()
        generations = len(passes[1]) // len(passes[0])
        means = reward.view(-1, generations).nanmean(dim=1)
        _, error = mean_and_error(means[~means.isnan()])
        if not error.isnan():
            metrics["reward_stderr"] = error
    metrics |= {"completions/mean_length": length.mean(), "completions/clipped_ratio": truncated.mean()}
    return {name: float(value) for name, value in metrics.items()}
