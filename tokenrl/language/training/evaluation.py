"""Evaluates a policy on held-out prompts: the rewards of its greedy and of its sampled completions.

pass@k, best@k, diversity and KL are estimated for each prompt and averaged over prompts, so their standard
errors are over prompts; lengths, truncations, entropy and the rewards of single functions are averaged over
completions or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from accelerate.utils import gather_object

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.rollout.generator import Generator
from tokenrl.language.rollout.sampling import Sampling, encode
from tokenrl.language.rollout.scoring import USUAL, Scoring
from tokenrl.language.training.probe import Row, best_of, distinct, known_rewards, over_prompts, sampled_rows

DIFFERENCE = "difference/"
"""Begins the names of metrics that compare a policy with another."""


class Evaluation(NamedTuple):
    """The metrics of an evaluation, and its greedy completions as table rows, one for each prompt.

    With `detailed`, `by_prompt` has the metrics that are means over prompts, for each prompt by itself; else
    it is empty.
    """

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    by_prompt: dict[str, list[float]]


def evaluate_policy(
    policy: Policy,
    prompts: Sequence[Row],
    rewards: Rewards,
    sampling: Sampling,
    *,
    generator: Generator | None = None,
    batch_size: int = 256,
    accelerator: Any = None,
    detailed: bool = False,
    k: Sequence[int] = (),
    reference: Policy | None = None,
    scoring: Scoring = USUAL,
) -> Evaluation:
    """Evaluate a policy on held-out prompts; several processes share them.

    Args:
        policy: the policy.
        prompts: rows with a `prompt`; other columns reach the rewards.
        rewards: the reward functions; `binary` and `pass_threshold` say what a right answer is.
        sampling: how completions are sampled; with 0 generations only the greedy completion is evaluated.
            Evaluations with the same seed use the same random numbers in every step of a run.
        generator: samples the completions; None for the policy's own model.
        batch_size: completions in one batch; changes memory only.
        accelerator: accelerate's handle, in a run of several processes.
        detailed: also compute the detailed metrics from the same completions.
        k: with `detailed`, the values of k for pass@k or best@k.
        reference: with `detailed`, the policy to which the KL of the sampled completions is estimated; both
            policies at the temperature of sampling.
        scoring: how the policy is scored, for what a generator of another engine does not return.

    Returns:
        The metrics `reward_greedy`; `reward`, the mean over sampled completions, with its standard error over
        prompts `reward_stderr`; `completions/mean_length` in tokens and `completions/clipped_ratio`, of the
        sampled completions.
        With `detailed` also `reward_greedy_stderr`; of the sampled completions, or of the greedy ones if none
        are sampled, `rewards/{name}/mean` and `entropy` in nats per token; and of the sampled completions
        `pass@k` if the rewards have a `pass_threshold`, `best@k` unless they are binary, where it is the
        same, `distinct_1` and `distinct_2`, and `kl` and `kl_k3` if there is a reference; with standard
        errors over prompts (`..._stderr`), but for the diversity.

    Raises:
        Refused: there are no prompts, a prompt is too long, a k is larger than the number of generations, or
            the reference has another vocabulary.
        Stopped: a reward function failed.
    """
    k, size = check_sizes(k, sampling.num_generations), sampling.num_generations
    if not prompts:
        raise Refused("There are no prompts to evaluate on: give an eval_split or an eval_size.")
    if reference is not None:
        _check_reference(policy, reference, prompts, sampling)
    how: dict[str, Any] = {"generator": generator, "accelerator": accelerator, "batch_size": batch_size}
    how |= {"stream": "evaluation", "scoring": scoring}
    passes = []
    for count in dict.fromkeys((0, size)):  # the greedy completions, then those that are sampled
        counted = replace(sampling, num_generations=count)
        rows = sampled_rows(policy, prompts, rewards, counted, reference=reference if count else None, **how)
        everywhere = rows if accelerator is None else gather_object(rows)
        passes.append(sorted(everywhere, key=lambda row: row["place"]))
    greedy, rows = passes[0], passes[-1]
    by_prompt = {"reward_greedy": [row["reward"] for row in greedy]}
    if size:
        by_prompt |= _by_prompt(rows, size, rewards, k)
    metrics = _metrics(rows, by_prompt, rewards, detailed)
    return Evaluation(metrics, greedy, by_prompt if detailed else {})


def check_sizes(k: Iterable[int], num_generations: int) -> tuple[int, ...]:
    """Sort the values of k and drop repeated ones.

    Raises:
        Refused: a k is larger than the number of completions per prompt, so there is no unbiased estimate.
    """
    sizes = tuple(sorted(set(k)))
    if sizes and not (sizes[0] >= 1 and sizes[-1] <= num_generations):
        given = f"k={' '.join(map(str, sizes))} with num_generations={num_generations}"
        raise Refused(f"{given}: the best of k needs k samples. Give k from 1 to {num_generations}, or more.")
    return sizes


def _check_reference(policy: Policy, reference: Policy, prompts: Sequence[Row], sampling: Sampling) -> None:
    """Refuse a reference to which no KL can be estimated: another vocabulary, no room, or no samples."""
    rows = [p.model.get_input_embeddings().num_embeddings for p in (policy, reference)]  # type: ignore[operator]
    if policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab() or rows[0] != rows[1]:
        raise Refused(
            f"The reference {reference.source!r} has another vocabulary than {policy.source!r}, so the KL is "
            "not defined. Give the model that training started from."
        )
    if not sampling.num_generations:
        raise Refused("num_generations=0 samples none, but the KL to a reference is estimated from samples.")
    encode(reference, [row["prompt"] for row in prompts], replace(sampling, truncate_prompts=False))


def _by_prompt(rows: Sequence[Row], size: int, rewards: Rewards, k: Sequence[int]) -> dict[str, list[float]]:
    """Compute the metrics that are means over prompts, for each of B prompts; nan where there is no value.

    Args:
        rows: the rows of the B * G sampled completions, prompt by prompt.
        size: G.
        rewards: the reward functions.
        k: values of k for pass@k or best@k, at most G.
    """
    known, mark = known_rewards(rows, size), rewards.pass_threshold
    groups = [rows[i : i + size] for i in range(0, len(rows), size)]
    each = {"reward": [float(total.mean()) if len(total) else math.nan for total in known]}
    for of in k:
        if not rewards.binary:
            each[f"best@{of}"] = [best_of(total, of) for total in known]
        if mark is not None:
            each[f"pass@{of}"] = [best_of(total >= mark, of) for total in known]
    for n in (1, 2):
        each[f"distinct_{n}"] = [distinct([row["ids"] for row in group], n) for group in groups]
    for name in [name for name in ("kl", "kl_k3") if name in rows[0]]:
        each[name] = [fmean(row[name] for row in group) for group in groups]
    return each


def _metrics(
    rows: Sequence[Row], by_prompt: Mapping[str, Sequence[float]], rewards: Rewards, detailed: bool
) -> dict[str, float]:
    """Average rewards of single functions over completions, the entropy over tokens, others over prompts."""

    def mean(values: Iterable[float]) -> float:
        return over_prompts(list(values)).value

    metrics = {"reward_greedy": mean(by_prompt["reward_greedy"])}
    if "reward" in by_prompt:
        metrics["reward"] = mean(row["reward"] for row in rows)
        metrics["reward_stderr"] = over_prompts(by_prompt["reward"]).stderr
    metrics["completions/mean_length"] = mean(row["length"] for row in rows)
    metrics["completions/clipped_ratio"] = mean(row["truncated"] for row in rows)
    if detailed:
        for i, name in enumerate(rewards.names):
            metrics[f"rewards/{name}/mean"] = mean(row["rewards"][i] for row in rows)
        metrics["entropy"] = sum(row["entropy"] for row in rows) / sum(row["length"] for row in rows)
        for name, values in by_prompt.items():
            value, error = over_prompts(values)
            metrics.setdefault(name, value)
            metrics |= {} if name.startswith("distinct") else {name + "_stderr": error}
    rewarded = ("reward", "reward_greedy")
    return {name: value for name, value in metrics.items() if name in rewarded or not math.isnan(value)}


def paired_differences(
    first: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Compare two policies that were evaluated on the same prompts, prompt by prompt.

    The standard error is that of the mean of the prompts' differences. It is smaller than that of two
    separate evaluations, because what makes a prompt hard is the same for both (Miller 2024, arXiv
    2411.00640). It is about these two sets of weights, and not about trainings with other seeds.

    Args:
        first: `Evaluation.by_prompt` of one policy.
        other: that of the other.

    Returns:
        For each name that both have, `difference/NAME`, other minus first, and `difference/NAME_stderr`.
        Prompts at which either has no value are left out.
    """
    found: dict[str, float] = {}
    for name in [name for name in other if name in first]:
        mean, error = over_prompts([b - a for a, b in zip(first[name], other[name], strict=True)])
        found |= {f"{DIFFERENCE}{name}": mean, f"{DIFFERENCE}{name}_stderr": error}
    return {name: value for name, value in found.items() if not math.isnan(value)}
