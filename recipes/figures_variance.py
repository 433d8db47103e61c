"""Draws what a constant baseline does: the variance of `(R - b) S` against b, a parabola.

The expected gradient is the same for every b, for E[S] = 0. The variance is `Var(b*) + (b - b*)^2 E|S|^2`,
least at `b* = E[|S|^2 R] / E[|S|^2]` (Greensmith et al. 2004), which is not the expected reward J:
completions with large scores count for more.

Look for: b = 0 (nothing subtracted) has a large variance; J has a smaller one, but not the least. RLOO's
baseline, the mean of the other G - 1 rewards of the prompt, has the mean J, but it is estimated. So its
variance (per completion: G times that of the step) lies above the curve, and approaches it as G grows. With
G = 2 it can be worse than no baseline at all, as here. That b* is the best constant is a theorem; how far J
is from it depends on the problem: try other values of --seed.

The problem has one prompt and 15 completions of at most 3 tokens, with reward 1 for right ones and 0 for
wrong ones; every group is enumerated.
"""

from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.lab import Problem, exact_moments, tabular_problem

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito


def variance_with_constant_baselines(problem: Problem, constants: list[float]) -> torch.Tensor:
    """Return the trace of the covariance of the gradient with one completion per prompt, for each constant b.

    The gradient is `(R - b) S`, averaged over prompts, with S the sum of the scores of a completion. The
    curve [K] is a parabola with its minimum at `best_constant_baseline`.

    Args:
        problem: The problem to enumerate.
        constants: The K values of b.
    """
    return torch.tensor(
        [
            exact_moments(Estimator(baseline="constant", baseline_constant=b), problem, group_size=1).variance
            for b in constants
        ],
        dtype=torch.double,
    )


def best_constant_baseline(problem: Problem) -> float:
    """Return the b of least variance, `E[|S|^2 R]/E[|S|^2]` (Greensmith et al. 2004; Weaver and Tao 2001)."""
    norms = problem.chances * problem.scores.sum(2).square().sum(-1)  # [P, M]
    return float((norms * problem.totals).sum() / norms.sum())


def rloo_variance(problem: Problem, size: int) -> float:
    """Variance per completion: G times that of the mean over a group of G."""
    return size * exact_moments(Estimator(), problem, group_size=size).variance


def draw(problem: Problem, best: float, mean: float, rloo: dict[int, float]) -> Figure:
    constants = [-0.6 + 0.025 * i for i in range(77)]
    variances = variance_with_constant_baselines(problem, constants)
    at_zero, at_best, at_mean = variance_with_constant_baselines(problem, [0.0, best, mean]).tolist()
    top = 1.12 * max(*rloo.values(), at_zero)
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(constants, variances, color=BLUE, linewidth=2.2)
    axes.annotate("", (mean, at_mean + 0.01), (mean, max(rloo.values())),
                  arrowprops={"arrowstyle": "->", "color": ORANGE, "alpha": 0.5})  # fmt: skip
    for b, variance, text, shift, side in (
        (0.0, at_zero, "b = 0: nothing is subtracted", (-10, 0), "right"),
        (best, at_best, f"b* = {best:.3f}: the least variance", (0, -20), "center"),
        (
            mean,
            at_mean,
            f"b = J = {mean:.3f}: {at_mean / at_best - 1:.0%} above the least",
            (-12, -5),
            "right",
        ),
    ):
        axes.scatter([b], [variance], color=BLUE, edgecolors="white", s=70, zorder=3)
        axes.annotate(text, (b, variance), shift, textcoords="offset points", color=BLUE, ha=side)
    for size, variance in rloo.items():
        axes.scatter([mean], [variance], color=ORANGE, marker="D", edgecolors="white", s=60, zorder=3)
        axes.annotate(f"RLOO, G = {size}", (mean, variance), (10, 0), textcoords="offset points", va="center",
                      color=ORANGE)  # fmt: skip
    axes.set_ylim(0, top)
    axes.set_xlim(constants[0], constants[-1])
    axes.set_xlabel("baseline b; for RLOO, the mean of its baseline")
    axes.set_ylabel("variance of one completion's gradient (trace)")
    title = "The expected reward is a good baseline, not the best; estimating it costs, less as G grows"
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EAEAEA", linewidth=0.8)
    return figure


def main(
    output: Path = Path("variance.png"), seed: int = 0, group_sizes: tuple[int, ...] = (2, 3, 4)
) -> None:
    problem = tabular_problem(seed, rewards="binary")
    best, mean = best_constant_baseline(problem), float((problem.chances * problem.totals).sum())
    rloo = {size: rloo_variance(problem, size) for size in group_sizes}
    for name, b in (("b = 0", 0.0), ("b = J", mean), ("b = b*", best), ("b = 1", 1.0)):
        variance = float(variance_with_constant_baselines(problem, [b]))
        print(f"{name:12} baseline {b:.4f}   variance {variance:.4f}")
    for size, variance in rloo.items():
        print(f"RLOO, G = {size:<2} baseline {mean:.4f}   variance {variance:.4f}")
    draw(problem, best, mean, rloo).savefig(output)
    print(f"figure: {output}")


if __name__ == "__main__":
    tyro.cli(main)
