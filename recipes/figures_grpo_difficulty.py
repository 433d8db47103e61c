"""Draws how GRPO weighs prompts by difficulty: `E[g] = w_G(p) grad p`, with p the probability of reward 1.

Rewards are 0 or 1. The gradient of J itself weighs every prompt by 1. GRPO divides a group's advantages by
the group's own standard deviation (ddof 1, plus 1e-4; the preset `grpo`), and that std is small where p is
near 0 or 1. With K right answers of G, K ~ Binomial(G, p), the weight is `E[s^2 / (std + eps)] / (p (1 -
p))`, s^2 = K/G (1 - K/G).

Look for: with two completions per prompt all prompts have the same weight, and only the step is smaller. More
completions raise the weight of rare successes and rare failures, up to about sqrt(G). The limit 1/sqrt(p (1 -
p)), as if the objective were 2 arcsin sqrt(p) (Davis and Recht 2025, arXiv 2510.13651), is reached only where
G is well above 1/p.

Lines come from the preset's own advantages (`weight_of_difficulty`); dots are the whole gradient of the
preset, summed over all groups that can be drawn; the formula is printed beside them.
"""

from dataclasses import replace
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.lab import exact_moments, tabular_problem

COLOURS = {2: "#0072B2", 4: "#56B4E9", 8: "#009E73", 16: "#E69F00", 64: "#D55E00"}  # Okabe and Ito
GRPO = Estimator.preset("grpo")


def weight_of_difficulty(estimator: Estimator, chances: list[float], group_size: int) -> torch.Tensor:
    """Return the weight w in `E[g] = w grad p` for a prompt with binary rewards, solved with probability p.

    w depends on the policy through p only: given its reward, the mean score of a completion is `grad p / p`
    or `-grad p / (1 - p)`. It is 1 for RLOO, (G-1)/G for the group mean, and for GRPO's advantages `E[s_K^2 /
    (std_K + eps)] / (p (1 - p))` with `s_K^2 = K/G (1 - K/G)` and K ~ Binomial(G, p).

    Args:
        estimator: The estimator whose advantages are used, with one prompt per step; the aggregation over
            tokens plays no part.
        chances: The K probabilities p, each strictly between 0 and 1.
        group_size: G, completions per prompt; the cost grows as G^2.

    Returns:
        The weight w for each p [K].
    """
    p = torch.tensor(chances, dtype=torch.double)
    solved = torch.arange(group_size + 1)  # K
    rewards = (torch.arange(group_size) < solved[:, None]).double()  # [G + 1, G]
    mask = torch.ones(group_size, 1, dtype=torch.double)
    advantages = torch.vmap(lambda r: estimator.advantages(r, mask, group_size=group_size).policy)(rewards)
    binomial = torch.distributions.Binomial(group_size, p[:, None])
    chance = binomial.log_prob(solved.double()).exp()  # [K, G + 1]
    right = (advantages.reshape(rewards.shape) * rewards).mean(-1)
    wrong = (advantages.reshape(rewards.shape) * (1 - rewards)).mean(-1)
    return (chance * (right / p[:, None] - wrong / (1 - p[:, None]))).sum(-1)


def formula(chances: list[float], size: int) -> torch.Tensor:
    """Return w_G(p) for each p, by the formula above, without the library."""
    p = torch.tensor(chances, dtype=torch.double)[:, None]
    k = torch.arange(size + 1).double()
    spread = k / size * (1 - k / size)  # s^2
    std = (spread * size / (size - 1)).sqrt() + GRPO.scale_eps
    chance = torch.distributions.Binomial(size, p).log_prob(k).exp()
    return (chance * spread / std).sum(-1) / (p * (1 - p))[:, 0]


def enumerated(seed: int, size: int) -> tuple[float, float]:
    """Return p and w of a prompt with one right and one wrong answer, from all 2^G groups."""
    problem = tabular_problem(seed, vocabulary=2, length=1, group_size=size)
    problem = replace(problem, rewards=torch.tensor([[0.0, 1.0]]).double())
    return float(problem.chances[0, 1]), exact_moments(GRPO, problem).scale


def draw(
    curves: dict[int, torch.Tensor], dots: dict[int, list[tuple[float, float]]], p: list[float]
) -> Figure:
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(p, [(x * (1 - x)) ** -0.5 for x in p], color="black", linestyle="--", linewidth=1.3)
    axes.text(0.0065, 17, "limit of large G:\n$1/\\sqrt{p(1-p)}$", fontsize=10)
    axes.text(
        0.5,
        5,
        "lines: from the advantages\ndots: all groups enumerated",
        ha="center",
        fontsize=9,
        color="#555555",
    )
    axes.axhline(1, color="#777777", linewidth=1)
    axes.annotate("every prompt alike: the gradient of J (RLOO)", (0.5, 1), (0, -5), ha="center", va="top",
                  textcoords="offset points", fontsize=9, color="#555555")  # fmt: skip
    for size, weights in curves.items():
        axes.plot(p, weights, color=COLOURS[size], linewidth=2.2)
        axes.annotate(f"G = {size}", (p[-1], weights[-1]), (6, 0), textcoords="offset points", va="center",
                      color=COLOURS[size], fontweight="bold", annotation_clip=False)  # fmt: skip
        for x, weight in dots.get(size, []):
            axes.scatter([x], [weight], s=34, zorder=3, color=COLOURS[size], edgecolors="white")
    axes.set_xscale("logit")
    axes.set_yscale("log")
    ticks = [0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999]
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
    axes.set_yticks([], minor=True)
    axes.set_xlim(0.001, 0.999)
    axes.set_xlabel("chance p that a completion of the prompt is right")
    axes.set_ylabel("weight w of the prompt's grad p")
    axes.set_title("GRPO lifts prompts that are nearly always failed or solved, if G is large", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EAEAEA", linewidth=0.8)
    return figure


def main(output: Path = Path("grpo_difficulty.png")) -> None:
    p = torch.linspace(-6.9067, 6.9067, 141, dtype=torch.double).sigmoid().tolist()
    curves = {size: weight_of_difficulty(GRPO, p, size) for size in COLOURS}
    dots = {size: [enumerated(seed, size) for seed in (48, 0, 1, 6, 49)] for size in (2, 4, 8)}
    print("  G   w(0.001)   w(0.1)   w(0.5)   w(0.1)/w(0.5)   off the formula   off the enumeration")
    for size, weights in curves.items():
        rare, tenth, half = weight_of_difficulty(GRPO, [0.001, 0.1, 0.5], size).tolist()
        off = float((weights - formula(p, size)).abs().max())
        away = [abs(w - float(weight_of_difficulty(GRPO, [x], size))) for x, w in dots.get(size, [])]
        enumeration = f"{max(away):.1e}" if away else "-"
        row = f"{size:3}   {rare:8.3f} {tenth:8.3f} {half:8.3f} {tenth / half:15.3f} {off:17.1e}"
        print(f"{row} {enumeration:>21}")
    print(f"lim   {0.001**-0.5 / 0.999**0.5:8.3f} {0.09**-0.5:8.3f} {2:8.3f} {0.09**-0.5 / 2:15.3f}")
    draw(curves, dots, p).savefig(output)
    print(f"figure: {output}")


if __name__ == "__main__":
    tyro.cli(main)
