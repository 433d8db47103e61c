"""What the completions of an evaluation say beside their mean reward, and the table a person reads.

Every number is a mean over prompts of something estimated within one prompt, so that its standard error is
that of the prompts' values; lengths, truncations, entropy and the functions' rewards are means over
completions or tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.training.probe import best_of, over_prompts
from tokenrl.runs.console import rich_table

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, Any]


def distinct(completions: Sequence[Sequence[int]], n: int) -> float:
    """Share of the n-grams of a prompt's completions that are different ones (Li et al. 2016, 1510.03055).

    1 where nothing is said twice, about 1/G where G completions are the same. It falls with their number and
    length, so compare it between equal evaluations. nan where no completion has n tokens.

    Args:
        completions: token ids of each, EOS included.
        n: tokens of an n-gram.
    """
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def check_sizes(k: Iterable[int], num_generations: int) -> tuple[int, ...]:
    """The sizes k in order, each once.

    Raises:
        Refused: fewer completions a prompt than a k asks for, of which nothing can be said without bias.
    """
    sizes = tuple(sorted(set(k)))
    if sizes and not (sizes[0] >= 1 and sizes[-1] <= num_generations):
        raise Refused(
            f"k={' '.join(map(str, sizes))}, but num_generations={num_generations}: the best of k is "
            f"estimated from k or more samples of a prompt. Give k from 1 to {num_generations}, or more "
            "num_generations."
        )
    return sizes


def details(
    greedy: Sequence[Row], sampled: Sequence[Row], names: Sequence[str], *, k: Sequence[int]
) -> dict[str, float]:
    """What `evaluate_policy` says in detail of its completions.

    Args:
        greedy: a row for each of B prompts.
        sampled: G rows for each, prompt-major; may be empty.
        names: of the reward functions.
        k: sizes of the best-of-k, at most G.

    Returns:
        `reward_greedy_stderr`; of the sampled rows (of the greedy ones, if there are none)
        `rewards/{name}/mean` and `entropy` in nats a token; of the sampled ones `pass@k` if every reward is 0
        or 1, else `best@k`, with `_stderr`; `distinct_1` and `distinct_2`; where they have them, `kl` and
        `kl_k3` with `_stderr`.
    """
    metrics = {"reward_greedy_stderr": over_prompts([row["reward"] for row in greedy]).stderr}
    rows = sampled or greedy
    by_function = np.array([row["rewards"] for row in rows], dtype=float)  # [N, F]
    for name, column in zip(names, by_function.T, strict=True):
        if not np.isnan(column).all():
            metrics[f"rewards/{name}/mean"] = float(np.nanmean(column))
    metrics["entropy"] = sum(row["entropy"] for row in rows) / sum(row["length"] for row in rows)
    if sampled:
        metrics |= _of_groups(sampled, len(sampled) // len(greedy), k)
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _of_groups(sampled: Sequence[Row], size: int, k: Sequence[int]) -> dict[str, float]:
    """Means over prompts of what is estimated from each prompt's samples."""
    groups = [sampled[i : i + size] for i in range(0, len(sampled), size)]
    known = [[row["reward"] for row in group if not math.isnan(row["reward"])] for group in groups]
    binary = all(reward in (0.0, 1.0) for rewards in known for reward in rewards)
    metrics: dict[str, float] = {}
    for size_k in k:
        values = [best_of(np.array(r), size_k) if len(r) >= size_k else math.nan for r in known]
        name, found = f"{'pass' if binary else 'best'}@{size_k}", over_prompts(values)
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
    "rewards/": "that function alone, before its weight",
    "pass@": "at least one of so many samples is right",
    "best@": "best of so many samples",
    "best_of_n@": "chosen among n by --reward: the task's own reward",
    "best_of_n_proxy@": "the same choice: the reward that chose",
    "best_of_n_kl@": "the same choice: KL to the model, in nats",
    "kl": "KL to the reference, nats a completion (k1)",
    "kl_k3": "the same by k3: less noisy near the reference",
    "entropy": "nats a token",
    "distinct_1": "share of different tokens among a prompt's samples",
    "distinct_2": "share of different pairs of tokens",
    "completions/mean_length": "tokens, EOS included",
    "completions/clipped_ratio": "share cut before an EOS",
}
"""What each line of the table says, in its order; a key that ends with / or @ stands for all it begins."""


def evaluation_table(metrics: Mapping[str, float], *, title: str) -> Table:
    """Table for people: name, value, standard error over prompts, meaning."""
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
