"""Computes the detailed metrics of an evaluation (pass@k, diversity, KL, entropy) and shows them in tables.

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
from tokenrl.language.training.probe import each_best_of_k, over_prompts, passed
from tokenrl.runs.console import measured, rich_table

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]
_DIFFERENCE = "difference/"


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


def values_by_prompt(
    greedy: Sequence[Row], sampled: Sequence[Row], rewards: Rewards, *, k: Sequence[int]
) -> dict[str, list[float]]:
    """Compute the metrics that are means over prompts, for each prompt by itself.

    Args:
        greedy: the row of the greedy completion of each of B prompts.
        sampled: the rows of the B * G sampled completions, prompt by prompt; may be empty.
        rewards: the reward functions, which say by `binary` and `pass_threshold` what a right answer is.
        k: values of k for pass@k or best@k, at most G.

    Returns:
        B values for each name, nan where there is none: `reward_greedy`, and from the sampled rows `reward`;
        `pass@k` if the rewards have a `pass_threshold`, and `best@k` unless they are binary, where it is the
        same; `distinct_1` and `distinct_2`; and, if the rows have them, `kl` and `kl_k3`.
    """
    each = {"reward_greedy": [row["reward"] for row in greedy]}
    if not sampled:
        return each
    size = len(sampled) // len(greedy)
    groups = [sampled[i : i + size] for i in range(0, len(sampled), size)]
    totals = [np.array([row["reward"] for row in group]) for group in groups]
    known = [total[~np.isnan(total)] for total in totals]
    each["reward"] = [float(total.mean()) if len(total) else math.nan for total in known]
    for size_k in k:
        if not rewards.binary:
            each[f"best@{size_k}"] = each_best_of_k(known, size_k)
        if rewards.pass_threshold is not None:
            each[f"pass@{size_k}"] = each_best_of_k(passed(known, rewards.pass_threshold), size_k)
    for n in (1, 2):
        each[f"distinct_{n}"] = [distinct([row["ids"] for row in group], n) for group in groups]
    for name in ("kl", "kl_k3"):
        if name in sampled[0]:
            each[name] = [float(np.mean([row[name] for row in group])) for group in groups]
    return each


def details(
    greedy: Sequence[Row], sampled: Sequence[Row], rewards: Rewards, each: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Compute the detailed metrics of `evaluate_policy`.

    Args:
        greedy: the row of the greedy completion of each of B prompts.
        sampled: the rows of the B * G sampled completions, prompt by prompt; may be empty.
        rewards: the reward functions.
        each: the values of `values_by_prompt`.

    Returns:
        The means of `each` over prompts, other than the rewards, with their standard errors (`..._stderr`)
        but for the diversity; `reward_greedy_stderr`; and, from the sampled rows, or from the greedy ones if
        there are no samples, `rewards/{name}/mean`, and `entropy` in nats per token.
    """
    rows = sampled or greedy
    metrics: dict[str, float] = {}
    by_function = np.array([row["rewards"] for row in rows], dtype=float)  # [N, F]
    for name, column in zip(rewards.names, by_function.T, strict=True):
        if not np.isnan(column).all():
            metrics[f"rewards/{name}/mean"] = float(np.nanmean(column))
    metrics["entropy"] = sum(row["entropy"] for row in rows) / sum(row["length"] for row in rows)
    for name, values in each.items():
        found = over_prompts(values)
        if name not in ("reward", "reward_greedy"):
            metrics[name] = found.value
        if name != "reward" and not name.startswith("distinct"):
            metrics[name + "_stderr"] = found.stderr
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def paired_differences(
    first: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """Compare two policies that were evaluated on the same prompts, prompt by prompt.

    The standard error is that of the mean of the prompts' differences. It is smaller than that of two
    separate evaluations, because what makes a prompt hard is the same for both (Miller 2024, arXiv
    2411.00640). It is about these two sets of weights, and not about trainings with other seeds.

    Args:
        first: the values of `values_by_prompt` of one policy.
        other: those of the other.

    Returns:
        For each name that both have, `difference/NAME`, other minus first, and `difference/NAME_stderr`.
        Prompts at which either has no value are left out.
    """
    found: dict[str, float] = {}
    for name in [name for name in other if name in first]:
        mean, error = over_prompts([b - a for a, b in zip(first[name], other[name], strict=True)])
        found |= {f"{_DIFFERENCE}{name}": mean, f"{_DIFFERENCE}{name}_stderr": error}
    return {name: value for name, value in found.items() if not math.isnan(value)}


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
    for name in _in_order(metrics):
        error = metrics.get(name + "_stderr")
        stderr = "" if error is None else f"{error:.4f}"
        table.add_row(name, f"{metrics[name]:.4f}", stderr, MEANINGS.get(_kind(name), ""))
    return table


def comparison_tables(models: Mapping[str, Mapping[str, float]], *, title: str) -> list[Table]:
    """Make two tables with a column per model: the metrics, and the paired differences to the first model.

    Args:
        models: metrics by model; those of every model but the first have those of `paired_differences`.
        title: text above the first table.
    """
    first, *others = models
    values = rich_table(f"{title} (± standard error)", ("",), list(models), overflow="fold")
    differences = rich_table(f"Minus {first}, by prompt", ("",), others, overflow="fold")
    for name in _in_order({name: 0.0 for metrics in models.values() for name in metrics}):
        if not name.startswith(_DIFFERENCE):
            cells = [measured(found.get(name), found.get(name + "_stderr")) for found in models.values()]
            values.add_row(name, *cells)
    for name in [name for name in _in_order(models[others[0]]) if name.startswith(_DIFFERENCE)]:
        found = [(models[other].get(name), models[other].get(name + "_stderr")) for other in others]
        cells = [("+" if value is not None and value > 0 else "") + measured(value, e) for value, e in found]
        differences.add_row(name.removeprefix(_DIFFERENCE), *cells)
    return [values, differences]


def _in_order(metrics: Mapping[str, float]) -> list[str]:
    """Return the names of the metrics in the order of `MEANINGS`, without those of standard errors."""
    order = {name: place for place, name in enumerate(MEANINGS)}
    shown = [name for name in metrics if not name.endswith("_stderr")]
    return sorted(shown, key=lambda name: order.get(_kind(name.removeprefix(_DIFFERENCE)), len(order)))


def _kind(name: str) -> str:
    """Return the key of `MEANINGS` to which a metric belongs."""
    return next((key for key in MEANINGS if key[-1] in "/@" and name.startswith(key)), name)
