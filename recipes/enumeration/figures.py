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

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from tokenrl.lab import prompt_weight

# The palette of Okabe and Ito.
BLUE, GREEN, YELLOW, RED, PINK = "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
SKY, GREY = "#56B4E9", "#555555"
SIZES = {2: BLUE, 4: SKY, 8: GREEN, 16: YELLOW, 64: RED}  # completions per prompt


def save(figure: Figure, output: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#EAEAEA", linewidth=0.8)
    figure.savefig(output)
    print(f"figure: {output}")


Rows = Mapping[Any, Callable[[int], Mapping[str, float]]]
"""What measures a problem, of which it gets the seed, by the name of its row."""


def table_of(rows: Rows, problems: int) -> pd.DataFrame:
    """Return a table of what is measured.

    A column holds medians over problems, or the largest number ("worst ..."), the least ("least ..."), the mean
    ("share ...").
    """
    kinds = {"worst": "max", "least": "min", "share": "mean"}
    table = {}
    for name, measure in rows.items():
        measured = pd.DataFrame([measure(seed) for seed in range(problems)])
        table[name] = measured.agg({x: kinds.get(x.split()[0], "median") for x in measured})
    return pd.DataFrame(table).T


def show(title: str, rows: Rows, problems: int) -> None:
    """Print a table of what is measured."""
    print(f"\n{title}\n{table_of(rows, problems).to_string(float_format='{:.3f}'.format)}")


Section = Callable[[int], None]


def program(*parts: Section, figure_of: Section | None = None) -> Callable[..., None]:
    """Return a program that prints sections of tables, which take the number of problems, and may draw a figure."""
    named = {part.__name__: part for part in parts}

    def main(
        sections: tuple[str, ...] = tuple(named), problems: int = 20, figure: bool = False
    ) -> None:
        """Print the tables of some sections, or of all; with `figure` draw the figure too, if there is one."""
        for section in sections:
            named[section](problems)
        if figure and figure_of is not None:
            figure_of(problems)

    return main


Curves = dict[str, tuple[Callable[[Tensor], Tensor], str, str]]
"""The weight of a prompt by its success rate, with a colour and a line, by name."""


def draw(curves: Curves, rates: tuple[float, ...], p: Tensor, output: Path, **look: Any) -> None:
    """Print the weights of prompts at some success rates, and draw them over all rates p."""
    figure = Figure(figsize=(8.5, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    table = {}
    for name, (weight, colour, line) in curves.items():
        axes.plot(p, weight(p), line, color=colour, linewidth=2.2, label=name)
        table[name] = weight(torch.tensor(rates, dtype=torch.double)).tolist()
    printed = pd.DataFrame(table, index=[f"p = {rate:g}" for rate in rates]).T
    print(printed.to_string(float_format="{:.3f}".format))
    axes.set(yscale="log", ylabel="weight w of the prompt's grad p", **look)
    axes.set_xlabel("p, the probability that a completion of the prompt is right")
    axes.legend(frameon=False, fontsize=9)
    save(figure, output)


def grpo_difficulty(output: Path = Path("grpo_difficulty.png")) -> None:
    """How GRPO weighs prompts by difficulty: `E[g] = w_G(p) grad p`, with p the probability of reward 1.

    Rewards are 0 or 1. The gradient of J itself weighs every prompt by 1. GRPO divides a group's advantages
    by their own standard deviation (ddof 1, plus 1e-4), which is small where p is near 0 or 1. With K right
    answers of G, K ~ Binomial(G, p), the weight is `E[s^2 / (std + eps)] / (p (1 - p))`, s^2 = K/G (1 - K/G).

    Look for: with two completions per prompt all prompts have the same weight, and only the step is
    smaller. More completions raise the weight of rare successes and rare failures, up to about sqrt(G). The
    limit 1/sqrt(p (1 - p)), as if the objective were 2 arcsin sqrt(p) (Davis and Recht 2025, arXiv
    2510.13651), is reached only where G is well above 1/p. Lines come from the preset's own advantages.
    """
    curves = {
        "limit of large G": (lambda p: (p * (1 - p)) ** -0.5, "black", "--"),
        "the gradient of J (RLOO)": (torch.ones_like, GREY, "-"),
    }
    for size, colour in SIZES.items():
        curves[f"G = {size}"] = partial(prompt_weight, "grpo", group_size=size), colour, "-"
    p = torch.linspace(-6.9067, 6.9067, 141, dtype=torch.double).sigmoid()
    title = "GRPO lifts prompts that are nearly always failed or solved, if G is large"
    draw(curves, (0.001, 0.1, 0.5), p, output, xscale="logit", xlim=(0.001, 0.999), title=title)


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
    curves = {
        name: (partial(prompt_weight, preset, group_size=8), colour, "-")
        for name, (preset, colour) in WEIGHED.items()
    }
    p = torch.linspace(0.005, 0.995, 199, dtype=torch.double)
    title = "Which prompts an objective learns from, G = 8"
    look = {"xlim": (0, 1), "ylim": (0.02, 10), "title": title}
    draw(curves, (0.02, 0.1, 0.3, 0.6, 0.9), p, output, **look)


if __name__ == "__main__":
    figures = {"objectives": objectives, "grpo-difficulty": grpo_difficulty}
    tyro.extras.subcommand_cli_from_dict(figures)
