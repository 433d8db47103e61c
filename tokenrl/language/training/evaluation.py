"""Evaluates a policy on held-out prompts: the rewards of its greedy and of its sampled completions."""

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
from tokenrl.language.rollout.rewarded import sample_and_reward
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.scoring import score_in_parts, with_missing_fields
from tokenrl.language.training.evaluation_metrics import check_sizes, details, values_by_prompt
from tokenrl.language.training.kl_control import completion_kl

LOGITS = 2**26  # most logits at once when a reference scores completions: 256 MiB in float32


class Evaluation(NamedTuple):
    """The metrics of an evaluation, and its greedy completions as table rows, one for each prompt.

    With `detailed`, `by_prompt` has the values of `values_by_prompt`; else it is empty.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    by_prompt: dict[str, list[float]]


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
    """Evaluate a policy on held-out prompts; several processes share them.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions.
        sampling: how completions are sampled; with 0 generations only the greedy completion is evaluated.
            Evaluations with the same seed use the same random numbers in every step of a run.
        generator: samples the completions; None for the policy's own model.
        batch_size: completions in one batch; changes memory only.
        accelerator: accelerate's handle, in a run of several processes.
        detailed: also compute the metrics of `details` from the same completions.
        k: with `detailed`, the values of k for pass@k or best@k.
        reference: with `detailed`, the policy to which the KL of the sampled completions is estimated; both
            policies at the temperature of sampling.

    Returns:
        The metrics `reward_greedy`; `reward`, the mean over sampled completions, with its standard error over
        prompts `reward_stderr`; `completions/mean_length` in tokens and `completions/clipped_ratio`, of the
        sampled completions; and those of `details`.

    Raises:
        Refused: there are no prompts, a prompt is too long, a k is larger than the number of generations, or
            the reference has another vocabulary.
        Stopped: a reward function failed.
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
        for places, rollout, result in sample_and_reward(
            policy, prompts, rewards, how, stream="evaluation", **shared
        ):
            known = with_missing_fields(policy, rollout, sampling.temperature, entropy=True)
            kl = _kl(reference if generations else None, known, sampling.temperature)
            rows += _completions(policy, prompts, places, known, result, kl)
        everywhere = rows if accelerator is None else gather_object(rows)
        passes.append(sorted(everywhere, key=lambda row: row["place"]))
    metrics, each = _summary(passes), {}
    if detailed:
        sampled = passes[1] if len(passes) > 1 else []
        each = values_by_prompt(passes[0], sampled, rewards, k=k)
        metrics |= details(passes[0], sampled, rewards, each)
    return Evaluation(metrics, passes[0], each)


def check_reference(policy: Policy, reference: Policy, longest_prompt: int, sampling: Sampling) -> None:
    """Refuse a reference to which no KL can be estimated.

    Args:
        policy: the policy that samples.
        reference: the policy that scores.
        longest_prompt: number of tokens of the longest prompt.
        sampling: how completions are sampled.

    Raises:
        Refused: the reference has another vocabulary or too short a context, or nothing is sampled.
    """
    longest = longest_prompt + sampling.max_completion_length
    rows = [p.model.get_input_embeddings().num_embeddings for p in (policy, reference)]  # type: ignore[operator]
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab() or rows[0] != rows[1]:
        raise Refused(
            f"The reference {reference.source!r} has another vocabulary than {policy.source!r}, so the KL "
            "between them is not defined. Give the model that training started from."
        )
    if reference.context is not None and longest > reference.context:
        raise Refused(
            f"Prompt and completion may have {longest} tokens together, but the context of the reference "
            f"{reference.source!r} is {reference.context} tokens. Lower max_completion_length."
        )
    if not sampling.num_generations:
        raise Refused(
            "The KL to a reference is estimated from sampled completions, but num_generations=0 samples "
            "none. Give 1 or more, or leave the reference out."
        )


def _kl(reference: Policy | None, rollout: Rollout, temperature: float) -> list[dict[str, float]]:
    """Estimate the KL of each completion to the reference (k1 and k3); empty rows without a reference."""
    n, width = rollout.mask.shape
    if reference is None:
        return [{}] * n
    vocabulary = reference.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    scored = score_in_parts(
        reference.model,
        rollout,
        rows_at_once=max(1, LOGITS // (width * vocabulary)),
        temperature=temperature,
        **reference.ways,
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
    """Return a row for each completion; its reward is NaN if every reward function abstained."""
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
    """Average over completions; the standard error is that of the prompts' mean rewards."""
    table = [
        torch.tensor([[row[k] for k in ("reward", "length", "truncated")] for row in rows]).double()
        for rows in passes
    ]
    metrics = {"reward_greedy": table[0][:, 0].nanmean()}
    reward, length, truncated = table[-1].unbind(dim=1)
    if len(passes) > 1:
        metrics["reward"] = reward.nanmean()
        generations = len(passes[1]) // len(passes[0])
        means = reward.view(-1, generations).nanmean(dim=1)
        _, error = mean_and_error(means[~means.isnan()])
        if not error.isnan():
            metrics["reward_stderr"] = error
    metrics |= {"completions/mean_length": length.mean(), "completions/clipped_ratio": truncated.mean()}
    return {name: float(value) for name, value in metrics.items()}
