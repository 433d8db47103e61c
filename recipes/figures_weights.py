"""Figures of what a divisor does: the weight of prompts by difficulty, and of completions by length.

    python recipes/figures_weights.py grpo-difficulty
    python recipes/figures_weights.py length-bias --output length_bias.png

Each is computed by enumeration in float64, prints its numbers and writes its figure; `--help` after its
name says what to look for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tokenrl import Estimator
from tokenrl.lab import Problem, exact_moments, tabular_problem

# The palette of Okabe and Ito.
BLUE, SKY, GREEN, YELLOW, RED = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"
GREY = "#555555"
GRPO = Estimator.preset("grpo")
SIZES = {2: BLUE, 4: SKY, 8: GREEN, 16: YELLOW, 64: RED}
LENGTHS = {"sequence_sum": GREEN, "token_mean": BLUE, "sequence_mean": RED}


def write(
    axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float] = (0, 0), **look: Any
) -> None:
    """Write a text at a place, shifted by points."""
    look = {"va": "center", "annotation_clip": False, "textcoords": "offset points"} | look
    axes.annotate(text, at, shift, **look)


def label_ticks(axes: Axes, x: Sequence[float] = (), y: Sequence[float] = ()) -> None:
    """Label these places alone, as plain numbers."""
    for places, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        if places:
            axis.set_ticks(places, [f"{place:g}" for place in places])
            axis.set_ticks([], minor=True)


def save(figure: Figure, output: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EAEAEA", linewidth=0.8)
    figure.savefig(output)
    print(f"figure: {output}")


def weight_of_difficulty(estimator: Estimator, chances: list[float], group_size: int) -> Tensor:
    """Return the weight w in `E[g] = w grad p` for a prompt with binary rewards, solved with probability p.

    w depends on the policy through p only: given its reward, the mean score of a completion is `grad p / p`
    or `-grad p / (1 - p)`. It is 1 for RLOO, and (G-1)/G for the group mean. The step has one prompt, and
    the aggregation over tokens plays no part.
    """
    p = torch.tensor(chances, dtype=torch.double)
    solved = torch.arange(group_size + 1)  # K
    rewards = (torch.arange(group_size) < solved[:, None]).double()  # [G + 1, G]
    mask = torch.ones(group_size, 1, dtype=torch.double)
    advantages = torch.vmap(lambda r: estimator.advantages(r, mask, group_size=group_size).policy)(rewards)
    chance = (
        torch.distributions.Binomial(group_size, p[:, None]).log_prob(solved.double()).exp()
    )  # [K, G + 1]
    right = (advantages.reshape(rewards.shape) * rewards).mean(-1)
    wrong = (advantages.reshape(rewards.shape) * (1 - rewards)).mean(-1)
    return (chance * (right / p[:, None] - wrong / (1 - p[:, None]))).sum(-1)


def weight_by_enumeration(seed: int, size: int) -> tuple[float, float]:
    """Return p and w of a prompt with one right and one wrong answer, from all 2^G groups."""
    problem = tabular_problem(seed, vocabulary=2, length=1, group_size=size)
    problem = replace(problem, rewards=torch.tensor([[0.0, 1.0]]).double())
    return float(problem.chances[0, 1]), exact_moments(GRPO, problem).scale


def grpo_difficulty(output: Path = Path("grpo_difficulty.png")) -> None:
    """How GRPO weighs prompts by difficulty: `E[g] = w_G(p) grad p`, with p the probability of reward 1.

    Rewards are 0 or 1. The gradient of J itself weighs every prompt by 1. GRPO divides a group's advantages
    by the group's own standard deviation (ddof 1, plus 1e-4; the preset `grpo`), and that std is small
    where p is near 0 or 1. With K right answers of G, K ~ Binomial(G, p), the weight is `E[s^2 / (std +
    eps)] / (p (1 - p))`, s^2 = K/G (1 - K/G).

    Look for: with two completions per prompt all prompts have the same weight, and only the step is
    smaller. More completions raise the weight of rare successes and rare failures, up to about sqrt(G). The
    limit 1/sqrt(p (1 - p)), as if the objective were 2 arcsin sqrt(p) (Davis and Recht 2025, arXiv
    2510.13651), is reached only where G is well above 1/p. Lines come from the preset's own advantages;
    dots are the whole gradient of the preset, summed over all groups that can be drawn.
    """
    p = torch.linspace(-6.9067, 6.9067, 141, dtype=torch.double).sigmoid().tolist()
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(p, [(x * (1 - x)) ** -0.5 for x in p], color="black", linestyle="--", linewidth=1.3)
    write(axes, "limit of large G:\n$1/\\sqrt{p(1-p)}$", (0.0065, 19))
    write(
        axes, "lines: from the advantages\ndots: all groups enumerated", (0.5, 5.3), ha="center", color=GREY
    )
    axes.axhline(1, color="#777777", linewidth=1)
    alike = "every prompt alike: the gradient of J (RLOO)"
    write(axes, alike, (0.5, 1), (0, -10), ha="center", fontsize=9, color=GREY)
    print("  G   w(0.001)   w(0.1)   w(0.5)   w(0.1)/w(0.5)   off the enumeration")
    for size, colour in SIZES.items():
        weights = weight_of_difficulty(GRPO, p, size)
        axes.plot(p, weights, color=colour, linewidth=2.2)
        write(axes, f"G = {size}", (p[-1], float(weights[-1])), (6, 0), color=colour, fontweight="bold")
        dots = [weight_by_enumeration(seed, size) for seed in (48, 0, 1, 6, 49)] if size <= 8 else []
        for x, weight in dots:
            axes.scatter([x], [weight], s=34, zorder=3, color=colour, edgecolors="white")
        rare, tenth, half = weight_of_difficulty(GRPO, [0.001, 0.1, 0.5], size).tolist()
        away = [abs(w - float(weight_of_difficulty(GRPO, [x], size))) for x, w in dots]
        enumeration = f"{max(away):.1e}" if away else "-"
        row = f"{size:3}   {rare:8.3f} {tenth:8.3f} {half:8.3f} {tenth / half:15.3f}"
        print(f"{row} {enumeration:>21}")
    print(f"lim   {0.001**-0.5 / 0.999**0.5:8.3f} {0.09**-0.5:8.3f} {2:8.3f} {0.09**-0.5 / 2:15.3f}")
    axes.set(xscale="logit", yscale="log", xlim=(0.001, 0.999), ylabel="weight w of the prompt's grad p",
             xlabel="chance p that a completion of the prompt is right")  # fmt: skip
    label_ticks(axes, (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999), (0.5, 1, 2, 4, 8, 16, 32))
    axes.set_title("GRPO lifts prompts that are nearly always failed or solved, if G is large", loc="left")
    save(figure, output)


def counts(rows: int, kinds: int) -> Tensor:
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

    def coefficient(rewards: Tensor, mask: Tensor) -> Tensor:
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


def length_bias(output: Path = Path("length_bias.png"), sizes: tuple[int, ...] = (2, 4, 8, 16, 32)) -> None:
    """The bias of `sequence_mean` and `token_mean`, which divide by length, and what it favours.

    RLOO's advantages are exact if the tokens of a completion are summed (`sequence_sum`, or `fixed_length`,
    which divides by a constant). `sequence_mean` (GRPO) divides a completion by its own length,
    `token_mean` (DAPO) divides the step by the number of its tokens; with both, a completion influences its
    own weight.

    Look for, on the left: the direction of token_mean is wrong by about 1/N, for each of N rows has a share
    of 1/N in the divisor; that of sequence_mean is equally wrong for any N. On the right: the mean factor
    of each token's score, for a right and a wrong completion of each length (token_mean: times the mean
    length). Under sequence_mean a long wrong answer is hardly pushed down, and a short right one is pushed
    up far more than a long right one, as Liu et al. 2025 (arXiv 2503.20783) say: an invitation to short
    successes, long failures.

    The problem has one prompt and five completions of one to four tokens; each token continues with
    probability 1/2. The order of rows does not matter, so the other N - 1 rows are summed over by how many
    there are of each completion, with multinomial probabilities, printed beside `exact_moments`.
    """
    problem = tabular_problem(0, vocabulary=2, length=4, even=True)
    problem = replace(problem, rewards=torch.tensor([[0.0, 1, 0, 1, 0]]).double())
    figure = Figure(figsize=(12, 4.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    print("aggregation       N   cosine   relative bias   after rescaling   off exact_moments (bias)")
    for name, colour in LENGTHS.items():
        estimator, errors = Estimator(aggregation=name), []
        for rows in sizes:
            cosine, bias, rescaled = direction(estimator, problem, rows)
            exact = exact_moments(estimator, problem, group_size=rows).relative_bias if rows <= 4 else None
            off = "-" if exact is None else f"{abs(bias - exact):.1e}"
            print(f"{name:15} {rows:3} {cosine:8.5f} {bias:15.5f} {rescaled:17.2e} {off:>17}")
            errors.append(rescaled)
        if name == "sequence_sum":
            continue
        left.plot(sizes, errors, "o-", color=colour, linewidth=2.2, markeredgecolor="white")
        write(left, name, (sizes[-1], errors[-1]), (8, 0), color=colour, fontweight="bold")
        if name == "token_mean":
            left.plot(sizes, [0.7 * errors[-1] * sizes[-1] / n for n in sizes], ":", color="#777777")
            write(left, "1/N", (sizes[1], 0.7 * errors[-1] * sizes[-1] / sizes[1]), (-22, -8), color=GREY)
    left.set_xscale("log", base=2)
    left.set(yscale="log", xlabel="N, rows a step", ylabel="tangent of the angle from grad J to E[g]")
    label_ticks(left, sizes, (0.01, 0.02, 0.05, 0.1, 0.2))
    left.set_title("Error of the direction (sequence_sum: 0)", loc="left")
    lengths, mean_length = range(1, 5), float(problem.chances[0] @ problem.mask.sum(-1))
    for name, colour in LENGTHS.items():
        unit = mean_length if name == "token_mean" else 1.0
        for reward in (0.0, 1.0):
            pulls = [unit * pull(Estimator(aggregation=name), problem, n, reward, 8) for n in lengths]
            print(f"{name:15} reward {reward:.0f}, lengths 1 to 4: " + " ".join(f"{x:7.3f}" for x in pulls))
            inside = colour if reward else "white"
            right.plot(
                lengths, pulls, "o-", color=colour, linewidth=2.2, markersize=8, markerfacecolor=inside
            )
        write(right, name, (4, pulls[-1]), (12, 0), color=colour, fontweight="bold")
    right.axhline(0, color="#777777", linewidth=1)
    right.set(xticks=lengths, xlabel="length of the completion, tokens")
    right.set_title("Push on each token, N = 8: ● right, ○ wrong", loc="left")
    save(figure, output)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"grpo-difficulty": grpo_difficulty, "length-bias": length_bias})
