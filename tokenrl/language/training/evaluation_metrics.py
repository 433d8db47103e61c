"""Computes the detailed metrics of an evaluation (pass@k, diversity, KL, entropy) and prints them as a table.

pass@k, best@k, diversity and KL are estimated for each prompt and averaged over prompts, so their standard
errors are over prompts; lengths, truncations, entropy and the rewards of single functions are averaged over
completions or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.rewards.rewards import Rewards
from tokenrl.language.training.probe import best_of_k, over_prompts, passed
from tokenrl.runs.console import rich_table

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Share of distinct n-grams among those of a prompt's completions (Li et al. 2016, arXiv 1510.03055).

    It is 1 if no n-gram occurs twice, and about 1/G if G completions are the same. It falls with the number
    and length of the completions, so compare it only between equal evaluations. It is nan if no completion
    has n tokens.

    Args:
        completions: token ids of each completion, EOS included.
        n: length of the n-grams in tokens.
    """
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def check_sizes(k: Iterable[int], num_generations: int) -> tuple[int, ...]:
    """Sort the values of k and drop repeated ones.

    Raises:
        Refused: a k is larger than the number of completions per prompt, so there is no unbiased estimate.
    """
    sizes = tuple(sorted(set(k)))
    if sizes and not (sizes[0] >= 1 and sizes[-1] <= num_generations):
        raise Refused(
            f"k={' '.join(map(str, sizes))}, but num_generations={num_generations}: the best of k is "
            f"estimated from at least k samples per prompt. Give k from 1 to {num_generations}, or raise "
            "num_generations."
        )
    return sizes


def details(
    greedy: Sequence[Row], sampled: Sequence[Row], rewards: Rewards, *, k: Sequence[int]
) -> dict[str, float]:
    """Compute the detailed metrics of `evaluate_policy`.

    Args:
        greedy: the row of the greedy completion of each of B prompts.
        sampled: the rows of the B * G sampled completions, prompt by prompt; may be empty.
        rewards: the reward functions, which say by `binary` and `pass_threshold` what a right answer is.
        k: values of k for pass@k or best@k, at most G.

    Returns:
        `reward_greedy_stderr`. From the sampled rows, or from the greedy ones if there are no samples:
        `rewards/{name}/mean`, and `entropy` in nats per token. From the sampled rows: `pass@k` if the
        rewards have a `pass_threshold`, and `best@k` unless they are binary, where it is the same;
        `distinct_1` and `distinct_2`; and, if the rows have them, `kl` and `kl_k3` in nats per completion.
        pass@k, best@k and the KLs come with standard errors (`..._stderr`).
    """
    metrics = {"reward_greedy_stderr": over_prompts([row["reward"] for row in greedy]).stderr}
    rows = sampled or greedy
    by_function = np.array([row["rewards"] for row in rows], dtype=float)  # [N, F]
    for name, column in zip(rewards.names, by_function.T, strict=True):
        if not np.isnan(column).all():
            metrics[f"rewards/{name}/mean"] = float(np.nanmean(column))
    metrics["entropy"] = sum(row["entropy"] for row in rows) / sum(row["length"] for row in rows)
    if sampled:
        metrics |= _of_groups(sampled, len(sampled) // len(greedy), rewards, k)
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _of_groups(sampled: Sequence[Row], size: int, rewards: Rewards, k: Sequence[int]) -> dict[str, float]:
    """Average over prompts what is estimated from the samples of each prompt."""
    groups = [sampled[i : i + size] for i in range(0, len(sampled), size)]
    totals = [np.array([row["reward"] for row in group]) for group in groups]
    known = [total[~np.isnan(total)] for total in totals]
    metrics: dict[str, float] = {}
    for size_k in k:
        kinds = {} if rewards.binary else {"best": best_of_k(known, size_k)}
        if rewards.pass_threshold is not None:
            kinds["pass"] = best_of_k(passed(known, rewards.pass_threshold), size_k)
        for kind, found in kinds.items():
            name = f"{kind}@{size_k}"
            metrics |= {name: found.value, name + "_stderr": found.stderr}
    for n in (1, 2):
        shares = [distinct([row["ids"] for row in group], n) for group in groups]
        metrics[f"distinct_{n}"] = over_prompts(shares).value
    for name in ("kl", "kl_k3"):
        if name in sampled[0]:
            found = over_prompts([float(np.mean([row[name] for row in group])) for group in groups])
            metrics |= {name: found.value, name + "_stderr": found.stderr}
    return metrics


MEANINGS = {
    "reward_greedy": "the greedy completion",
    "reward": "mean of all samples (avg@k)",
    "rewards/": "this reward function alone, before its weight",
    "pass@": "probability that at least one of k samples is right",
    "best@": "expected best reward of k samples",
    "best_of_n@": "task's own reward of the best of n, chosen by --reward",
    "best_of_n_proxy@": "reward of the same choice by --reward itself",
    "best_of_n_kl@": "KL of best-of-n to the model, in nats",
    "kl": "KL to the reference, nats per completion (k1)",
    "kl_k3": "the same KL estimated by k3: less noise near the reference",
    "entropy": "nats per token",
    "distinct_1": "different tokens / all tokens, among a prompt's samples",
    "distinct_2": "different pairs of adjacent tokens / all pairs",
    "completions/mean_length": "tokens, EOS included",
    "completions/clipped_ratio": "share cut at the maximum length, before an EOS",
}
"""Meaning of each metric, in the order of the table; a key that ends with / or @ is a prefix of names."""


def evaluation_table(metrics: Mapping[str, float], *, title: str) -> Table:
    """Make a table of the metrics: name, value, standard error over prompts, meaning."""
    table = rich_table(title, ("",), ("value", "stderr"), overflow="fold")
    table.add_column("")
    order = {name: place for place, name in enumerate(MEANINGS)}

    def kind(name: str) -> str:
        return next((key for key in MEANINGS if key[-1] in "/@" and name.startswith(key)), name)

    shown = [name for name in metrics if not name.endswith("_stderr")]
    for name in sorted(shown, key=lambda name: order.get(kind(name), len(order))):
        error = metrics.get(name + "_stderr")
        stderr = "" if error is None else f"{error:.4f}"
        table.add_row(name, f"{metrics[name]:.4f}", stderr, MEANINGS.get(kind(name), ""))
    return table
