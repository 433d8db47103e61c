"""Figures that teach: each is computed by enumeration in float64, where everything can be listed.

    python recipes/enumeration/figures.py objectives   (or grpo-difficulty)

Each prints its numbers and writes its figure; `--help` after its name says what to look for.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from dataclasses import replace
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.lab import exact_moments, prompt_weight, tabular_problem

# The palette of Okabe and Ito.
BLUE, GREEN, YELLOW, RED, PINK = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
SKY, GREY = "#56B4E9", "#555555"
GRPO = Estimator.preset("grpo")
SIZES = {2: BLUE, 4: SKY, 8: GREEN, 16: YELLOW, 64: RED}  # completions per prompt


def save(figure: Figure, output: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EAEAEA", linewidth=0.8)
    figure.savefig(output)
    print(f"figure: {output}")


def weight_by_enumeration(seed: int, size: int) -> tuple[float, float]:
    """Return p and w of a prompt with one right and one wrong answer, from all 2^G groups."""
    problem = tabular_problem(seed, vocabulary=2, length=1, group_size=size)
    problem = replace(problem, rewards=torch.tensor([[0.0, 1.0]]).double())
    return float(problem.chances[0, 1]), exact_moments(GRPO, problem).scale


def grpo_difficulty(output: Path = Path("grpo_difficulty.png")) -> None:
    """How GRPO weighs prompts by difficulty: `E[g] = w_G(p) grad p`, with p the probability of reward 1.

    Rewards are 0 or 1. The gradient of J itself weighs every prompt by 1. GRPO divides a group's advantages
    by their own standard deviation (ddof 1, plus 1e-4), which is small where p is near 0 or 1. With K right
    answers of G, K ~ Binomial(G, p), the weight is `E[s^2 / (std + eps)] / (p (1 - p))`, s^2 = K/G (1 - K/G).

    Look for: with two completions per prompt all prompts have the same weight, and only the step is
    smaller. More completions raise the weight of rare successes and rare failures, up to about sqrt(G). The
    limit 1/sqrt(p (1 - p)), as if the objective were 2 arcsin sqrt(p) (Davis and Recht 2025, arXiv
    2510.13651), is reached only where G is well above 1/p. Lines come from the preset's own advantages;
    dots are its whole gradient, summed over all groups that can be drawn.
    """
    p = torch.linspace(-6.9067, 6.9067, 141, dtype=torch.double).sigmoid().tolist()
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    limit = [(x * (1 - x)) ** -0.5 for x in p]
    axes.plot(p, limit, color="black", linestyle="--", linewidth=1.3, label="limit of large G")
    axes.axhline(1, color=GREY, linewidth=1, label="the gradient of J (RLOO)")
    print("  G   w(0.001)   w(0.1)   w(0.5)   w(0.1)/w(0.5)   off the enumeration")
    for size, colour in SIZES.items():
        weights = prompt_weight(GRPO, torch.tensor(p).double(), size)
        axes.plot(p, weights, color=colour, linewidth=2.2, label=f"G = {size}")
        dots = (
            [weight_by_enumeration(seed, size) for seed in (48, 0, 1, 6, 49)] if size <= 8 else []
        )
        for x, weight in dots:
            axes.scatter([x], [weight], s=34, zorder=3, color=colour, edgecolors="white")
        rare, tenth, half = (float(prompt_weight(GRPO, x, size)) for x in (0.001, 0.1, 0.5))
        away = [abs(w - float(prompt_weight(GRPO, x, size))) for x, w in dots]
        enumeration = f"{max(away):.1e}" if away else "-"
        row = f"{size:3}   {rare:8.3f} {tenth:8.3f} {half:8.3f} {tenth / half:15.3f}"
        print(f"{row} {enumeration:>21}")
    print(
        f"lim   {0.001**-0.5 / 0.999**0.5:8.3f} {0.09**-0.5:8.3f} {2:8.3f} {0.09**-0.5 / 2:15.3f}"
    )
    axes.set(xscale="logit", yscale="log", xlim=(0.001, 0.999), ylabel="weight w of the prompt's grad p",
             xlabel="chance p that a completion of the prompt is right")  # fmt: skip
    axes.legend(frameon=False, loc="upper center", title="dots: all groups enumerated")
    axes.set_title(
        "GRPO lifts prompts that are nearly always failed or solved, if G is large", loc="left"
    )
    save(figure, output)


WEIGHED = {  # what is ascended on rewards of 0 and 1, by the estimator
    "mean reward (rloo)": ("rloo", GREEN),
    "divided by the std (grpo)": ("baseline=group_mean,scale=group_std,scale_ddof=0", GREY),
    "pass@2 (max_at_k)": ("max_at_k,objective_order=2", SKY),
    "pass@4 (max_at_k)": ("max_at_k,objective_order=4", BLUE),
    "log of success (maxrl)": ("maxrl", RED),
    "failures kept": ("maxrl,objective_form=keep_failures", YELLOW),
    "leave-one-out": ("maxrl,objective_form=leave_one_out", PINK),
}


def objectives(output: Path = Path("objectives.png")) -> None:
    """How each objective weighs a prompt by its success rate p: `E[g] = w(p) grad p`, rewards of 0 and 1.

    Look for: the mean reward weighs all prompts by 1. pass@k gives up prompts that are mostly solved, and
    weighs a prompt that is hardly ever solved by k. The log of success weighs it by G - 1, or by G if failed
    groups are kept; its leave-one-out form learns nothing from a lone success, so hard prompts lose.
    """
    p = torch.linspace(0.005, 0.995, 199, dtype=torch.double)
    figure = Figure(figsize=(8.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    rates = (0.02, 0.1, 0.3, 0.6, 0.9)
    print(f"{'w(p), G = 8':28}" + "".join(f"p = {x:<8g}" for x in rates))
    for name, (preset, colour) in WEIGHED.items():
        axes.plot(p, prompt_weight(preset, p, 8), color=colour, linewidth=2.2, label=name)
        weights = [float(prompt_weight(preset, x, 8)) for x in rates]
        print(f"{name:28}" + "".join(f"{weight:<12.3f}" for weight in weights))
    axes.set(xlim=(0, 1), yscale="log", ylim=(0.02, 10), ylabel="weight w of the prompt's grad p",
             xlabel="p, the success rate of the prompt")  # fmt: skip
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.set_title("Which prompts an objective learns from, G = 8", loc="left")
    save(figure, output)


if __name__ == "__main__":
    figures = {"objectives": objectives, "grpo-difficulty": grpo_difficulty}
    tyro.extras.subcommand_cli_from_dict(figures)
