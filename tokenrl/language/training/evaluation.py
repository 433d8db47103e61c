"""Reward of a policy on held-out prompts: of the greedy completion, and of sampled ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from tokenrl.core.statistics import mean_and_error
from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import RewardResult, Rewards
from tokenrl.language.rollout.judged import judged
from tokenrl.language.rollout.rollout import Rollout
from tokenrl.language.rollout.scoring import score
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
    *,
    max_completion_length: int,
    num_generations: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    truncate_prompts: bool = False,
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
        max_completion_length: most tokens a completion may have.
        num_generations: sampled completions a prompt; 0 evaluates the greedy completion only.
        temperature: of the sampled completions.
        seed: of sampling; evaluations with the same seed share their random numbers.
        step: passed to the rewards, for those that ask.
        truncate_prompts: drop tokens from the left of prompts too long.
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
    k = check_sizes(k, num_generations)
    if not prompts:
        raise Refused(
            "There are no prompts to evaluate on. Give an eval_split, or hold rows out with eval_size."
        )
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    if reference is not None:
        every, options = [row["prompt"] for row in prompts], {"truncate": truncate_prompts}
        ids = policy.encode_all(every, max_completion_length=max_completion_length, **options)
        check_reference(policy, reference, max(map(len, ids)) + max_completion_length, num_generations)
    how: dict[str, Any] = {
        "max_completion_length": max_completion_length,
        "temperature": temperature,
        "seed": seed,
        "step": step,
        "truncate_prompts": truncate_prompts,
        "batch_size": batch_size,
    }
    passes: list[list[dict[str, Any]]] = []
    for generations in dict.fromkeys((0, num_generations)):
        rows: list[dict[str, Any]] = []
        for places, rollout, result in judged(
            policy, prompts, rewards, stream="evaluation", num_generations=generations, rank=rank,
            world=world, **how,
        ):  # fmt: skip
            kl = _kl(reference if generations else None, rollout, temperature)
            rows += _completions(policy, prompts, places, rollout, result, kl)
        passes.append(rows if world == 1 else sorted(gather_object(rows), key=lambda row: row["place"]))
    metrics = _summary(passes)
    if detailed:
        metrics |= details(passes[0], passes[1] if len(passes) > 1 else [], rewards.names, k=k)
    return Evaluation(metrics, passes[0])


def check_reference(policy: Policy, reference: Policy, longest: int, num_generations: int) -> None:
    """Refuse a reference that cannot score the policy's completions.

    Args:
        policy: the policy that samples.
        reference: the policy that scores.
        longest: most tokens of a prompt and its completion.
        num_generations: sampled completions a prompt.

    Raises:
        Refused: other tokens, a shorter context, or no samples to estimate a KL from.
    """
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
    if not num_generations:
        raise Refused(
            "The KL to a reference is estimated from sampled completions, but num_generations=0 samples "
            "none. Give 1 or more, or no reference."
        )


@torch.no_grad()
def _kl(reference: Policy | None, rollout: Rollout, temperature: float) -> list[dict[str, float]]:
    """Both estimates of the KL of each completion; nothing of each without a reference."""
    n, width = rollout.mask.shape
    if reference is None:
        return [{}] * n
    vocabulary = reference.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    scored = torch.zeros_like(rollout.logprobs)
    for rows in torch.arange(n, device=scored.device).split(max(1, LOGITS // (width * vocabulary))):
        part = rollout.rows(rows)
        scores = score(reference.model, part, temperature=temperature, share_prompt=reference.share_prompt)
        scored[rows, : part.mask.shape[1]] = scores.logprobs.to(scored.dtype)
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
