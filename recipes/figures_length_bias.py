"""Draws the bias of `sequence_mean` and `token_mean`, which divide by length, and what it favours.

RLOO's advantages are exact if the tokens of a completion are summed (`sequence_sum`, or `fixed_length`, which
divides by a constant). `sequence_mean` (GRPO) divides a completion by its own length, `token_mean` (DAPO)
divides the step by the number of its tokens; with both, a completion influences its own weight.

Look for, on the left: the direction of token_mean is wrong by about 1/N, for each of N rows has a share of
1/N in the divisor; that of sequence_mean is equally wrong for any N. On the right: the mean factor of each
token's score, for a right and a wrong completion of each length (token_mean: times the mean length). Under
sequence_mean a long wrong answer is hardly pushed down, and a short right one is pushed up far more than a
long right one, as Liu et al. 2025 (arXiv 2503.20783) say: an invitation to short successes and long failures.

The problem has one prompt and five completions of one to four tokens; the group has N rows. The numbers are
exact: the order of rows does not matter, so the other N - 1 rows are summed over by how many there are of
each completion, with multinomial probabilities. They are printed beside those of `exact_moments`.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.lab import Problem, exact_moments, tabular_problem

COLOURS = {"sequence_sum": "#009E73", "token_mean": "#0072B2", "sequence_mean": "#D55E00"}  # Okabe and Ito


def the_problem() -> Problem:
    """Each token continues with probability 1/2; answers of 2 tokens, and of 4 that end, are right."""
    problem = tabular_problem(0, vocabulary=2, length=4, even=True)
    return replace(problem, rewards=torch.tensor([[0.0, 1, 0, 1, 0]]).double())


def counts(rows: int, kinds: int) -> torch.Tensor:
    """List the ways to have `rows` rows of some kinds [X, kinds]: bars between stars."""

    def one() -> Iterator[list[int]]:
        for bars in combinations(range(rows + kinds - 1), kinds - 1):
            edges = (-1, *bars, rows + kinds - 1)
            yield [b - a - 1 for a, b in pairwise(edges)]

    return torch.tensor(list(one()))


def pull(estimator: Estimator, problem: Problem, length: int, reward: float, rows: int) -> float:
    """Give the expected coefficient of the score of a completion in a step of `rows`, times `rows`."""
    chances, width = problem.chances[0], problem.mask.shape[1]
    others = counts(rows - 1, len(chances)).double()  # [X, M]
    total = torch.lgamma(torch.tensor(rows).double()) - torch.lgamma(others + 1).sum(-1)
    chance = (total + (others * chances.log()).sum(-1)).exp()
    chosen = torch.arange(len(chances)).repeat(len(others)).repeat_interleave(others.flatten().long())
    chosen = chosen.reshape(len(others), rows - 1)
    one = (torch.arange(width) < length).double().expand(len(others), 1, width)
    masks = torch.cat([one, problem.mask[chosen]], dim=1)  # [X, N, T], the completion first
    rewards = torch.cat([torch.full((len(others), 1), reward), problem.rewards[0, chosen]], dim=1).double()

    def coefficient(rewards: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        advantages = estimator.advantages(rewards, mask, group_size=rows).policy
        return (advantages.reshape(rows, -1) * estimator.token_weights(mask, max_length=None))[0, 0]

    return float(rows * chance @ torch.vmap(coefficient)(rewards, masks))


def direction(estimator: Estimator, problem: Problem, rows: int) -> tuple[float, float, float]:
    """Compare E[g] with grad J: cosine, |E g - grad J| / |grad J|, and the same after the best rescaling."""
    lengths, rewards = problem.mask.sum(-1).int().tolist(), problem.rewards[0].tolist()
    pulls = [pull(estimator, problem, *kind, rows) for kind in zip(lengths, rewards, strict=True)]
    scores = problem.chances[0, :, None] * problem.scores[0].sum(1)
    mean, target = torch.tensor(pulls, dtype=torch.double) @ scores, problem.gradient()[0]
    scale = mean @ target / (target @ target)
    errors = [(m - target).norm() / target.norm() for m in (mean, mean / scale)]
    return float(mean @ target / (mean.norm() * target.norm())), float(errors[0]), float(errors[1])


def draw_error(axes: Axes, sizes: tuple[int, ...], errors: dict[str, list[float]]) -> None:
    for name, values in errors.items():
        axes.plot(sizes, values, "o-", color=COLOURS[name], linewidth=2.2, markeredgecolor="white")
        axes.annotate(name, (sizes[-1], values[-1]), (8, 0), textcoords="offset points", va="center",
                      color=COLOURS[name], fontweight="bold", annotation_clip=False)  # fmt: skip
    last = errors["token_mean"][-1] * 0.7
    axes.plot(sizes, [last * sizes[-1] / n for n in sizes], ":", color="#777777")
    axes.annotate("1/N", (sizes[1], last * sizes[-1] / sizes[1]), (-6, -12), textcoords="offset points",
                  ha="right", color="#555555")  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(n) for n in sizes])
    axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2], ["0.01", "0.02", "0.05", "0.1", "0.2"])
    axes.set_yticks([], minor=True)
    axes.set_ylabel("tangent of the angle from grad J to E[g]")
    axes.set_xlabel("N, rows a step")
    axes.set_title("Error of the direction (sequence_sum: 0)", loc="left")


def draw_pull(axes: Axes, shares: dict[str, dict[float, list[float]]]) -> None:
    for name, by_reward in shares.items():
        for reward, values in by_reward.items():
            lengths = range(1, len(values) + 1)
            axes.plot(lengths, values, "o-", color=COLOURS[name], linewidth=2.2, markersize=8,
                      markerfacecolor=COLOURS[name] if reward else "white")  # fmt: skip
        axes.annotate(name, (lengths[-1], by_reward[1.0][-1]), (12, 0), textcoords="offset points",
                      va="center", color=COLOURS[name], fontweight="bold", annotation_clip=False)  # fmt: skip
    axes.set_xticks(list(lengths))
    axes.axhline(0, color="#777777", linewidth=1)
    axes.set_xlabel("length of the completion, tokens")
    axes.set_title("Push on each token, N = 8: ● right, ○ wrong", loc="left")


def main(output: Path = Path("length_bias.png"), sizes: tuple[int, ...] = (2, 4, 8, 16, 32)) -> None:
    problem, errors = the_problem(), {}
    print("aggregation       N   cosine   relative bias   after rescaling   off exact_moments (bias)")
    for name in COLOURS:
        estimator = Estimator(aggregation=name)
        found = {rows: direction(estimator, problem, rows) for rows in sizes}
        for rows, (cosine, bias, rescaled) in found.items():
            exact = exact_moments(estimator, problem, group_size=rows).relative_bias if rows <= 4 else None
            off = "-" if exact is None else f"{abs(bias - exact):.1e}"
            print(f"{name:15} {rows:3} {cosine:8.5f} {bias:15.5f} {rescaled:17.2e} {off:>17}")
        errors[name] = [rescaled for _, _, rescaled in found.values()]
    del errors["sequence_sum"]
    shares: dict[str, dict[float, list[float]]] = {}
    for name in COLOURS:
        pulls = {
            r: [pull(Estimator(aggregation=name), problem, n, r, 8) for n in range(1, 5)] for r in (1.0, 0.0)
        }
        unit = {"token_mean": float(problem.chances[0] @ problem.mask.sum(-1))}.get(name, 1.0)
        shares[name] = {r: [unit * x for x in values] for r, values in pulls.items()}
        for reward, values in shares[name].items():
            print(f"{name:15} reward {reward:.0f}, lengths 1 to 4: " + " ".join(f"{x:7.3f}" for x in values))
    figure = Figure(figsize=(12, 4.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_error(left, sizes, errors)
    draw_pull(right, shares)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EAEAEA", linewidth=0.8)
    figure.savefig(output)
    print(f"figure: {output}")


if __name__ == "__main__":
    tyro.cli(main)
