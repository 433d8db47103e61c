"""Enumerates what the forms of distillation on the student's own samples compute, and what their noise costs.

    python recipes/enumeration/distillation_forms.py

Each form estimates the gradient of -KL(student || teacher) of whole completions, of a fixed length and of lengths
that an end token decides. Only the tables of `recipes/pages/explain/distillation.md` are replaced;
`recipes/figures/distillation_forms.png` is the figure. Look for: where prefixes are held fixed, more completions do
not lower the error below the bias.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import tyro
from figures import save
from kl_gradients import apart
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.lab import Moments, Problem, exact_moments

RECIPES = Path(__file__).parents[1]
PAGE = RECIPES / "pages" / "explain" / "distillation.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
PRESETS = (
    "opd",
    "vopd",
    "opd_full",
    "opd_to_go",
    "opd_to_go,kl_baseline=closed_form",
    "opd_full_path",
)
PAIRS = (("opd_to_go", "opd"), ("opd_full_path", "opd_full"), ("opd_full_path", "opd"))
LOOKS = {  # of lines in the figure, in colours of Okabe and Ito
    "opd": ("#D55E00", "--", "prefix fixed"),
    "opd_full": ("#E69F00", "--", "prefix fixed"),
    "opd_to_go": ("#0072B2", "-", "exact"),
    "opd_full_path": ("#009E73", "-", "exact"),
}
DISTANCES = (0.3, 1.0, 3.0)
KINDS = {  # the tokens that end a completion, by what its length is
    "Every completion has T tokens": (),
    "One of the three tokens ends a completion, after T tokens at the latest": (0,),
}
GROUP = 4

Case = tuple[float, int]  # a distance of the teacher, and a length of the completions
Results = dict[Case, dict[str, list[Moments]]]  # by form, one for each problem


def distillation_problem(seed: int, *options: Any) -> Problem:
    """List all completions of a policy whose reference, at a distance, is its teacher. There are no rewards."""
    problem = apart(seed, *options)
    return replace(problem, rewards=torch.zeros_like(problem.rewards))


def iw_opd(problem: Problem, gamma: float = 0.5) -> Moments:
    """Return the moments of TRL's importance-weighted form: `l_t (1 + gamma (1 - sum_{s<t} |l_s| / sum_s |l_s|))`.

    The source is arXiv 2606.22600, and `trl/experimental/iw_opd/iw_opd_trainer.py` of TRL 1.16.
    """
    ratios = (problem.ref_logprobs - problem.logprobs)[0]  # [M, T]
    sizes = ratios.abs()
    before = sizes.cumsum(-1) - sizes
    credit = ratios * (1 + gamma * (1 - before / sizes.sum(-1, keepdim=True)))
    directions = torch.einsum("mt,mtd->md", credit, problem.scores[0])
    chances = problem.chances[0]
    second = chances @ directions.square().sum(-1)
    return Moments((chances @ directions)[None], problem.gradient(beta=1.0), float(second))


def rloo_of_log_ratio(problem: Problem) -> Moments:
    """Return the moments of RLOO whose reward is the log ratio of the whole completion.

    A step is the mean of `(R_i - R_j) (S_i - S_j) / 2` over the pairs of its group, with R the reward and S the
    score of a completion. Its variance follows from that of a completion and of a pair (Hoeffding 1948). It is
    multiplied by the size of the group: like the other forms it is the variance by completion.
    """
    chances = problem.chances[0]
    rewards = (problem.ref_logprobs - problem.logprobs).sum(-1)[0]  # [M]
    scores = problem.scores.sum(-2)[0]  # [M, D]
    centred = (rewards - chances @ rewards)[:, None] * scores
    mean = chances @ centred
    signal = mean.square().sum()
    of_row = chances @ centred.square().sum(-1) - signal
    norms = scores.square().sum(-1)
    gaps = norms[:, None] + norms - 2 * scores @ scores.T
    of_pair = chances @ ((rewards[:, None] - rewards).square() * gaps / 4) @ chances - signal
    variance = ((GROUP - 2) * of_row + 2 * of_pair) / (GROUP - 1)
    return Moments(mean[None], problem.gradient(beta=1.0), float(variance + signal))


OTHERS = {
    f"RLOO of {GROUP}, KL in the reward": rloo_of_log_ratio,
    "iw_opd of TRL": iw_opd,
}


def measure(problem: Problem) -> dict[str, Moments]:
    """Return the moments of the presets for a step of one completion."""
    return {name: exact_moments(Estimator.preset(name), problem, group_size=1) for name in PRESETS}


def relative_error(moments: Moments, completions: float) -> float:
    """Return E|g - grad|^2 / |grad|^2 of a step: squared bias + variance / completions."""
    error = float(moments.bias.square().sum()) + moments.variance / completions
    return error / float(moments.target.square().sum())


def crossing(exact: Moments, biased: Moments) -> float:
    """Return how many completions give both forms the same error; the exact form is better with more."""
    excess = exact.variance - biased.variance
    return max(1.0, excess / float(biased.bias.square().sum()))


def short(number: float) -> str:
    """Write a number with two significant digits."""
    return "0" if abs(number) < 1e-9 else f"{float(f'{number:.2g}'):g}"


def bias_of(moments: list[Moments]) -> str:
    """Write the median bias, the largest, and the least cosine."""
    biases = [m.relative_bias for m in moments]
    return f"{short(median(biases))} ({short(max(biases))}), {min(m.cosine for m in moments):.2f}"


def table(corner: str, columns: Mapping[str, Mapping[str, object]]) -> str:
    """Return a table in Markdown of cells by column and row."""
    frame = pd.DataFrame(columns)
    lines = [[corner, *frame], ["---"] * (1 + len(columns)), *frame.reset_index().to_numpy()]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def tables(results: Results) -> Iterator[str]:
    """Yield the tables of bias, of noise and of crossings; each column is a case."""
    heads = {"opd, vopd, opd_full": "opd", "iw_opd of TRL": "iw_opd of TRL"}
    biases, noises, crossings = {}, {}, {}
    for (distance, length), forms in results.items():
        label = f"T = {length}" if distance == 1 else f"T = {length}, distance {distance:g}"
        biases[label] = {head: bias_of(forms[name]) for head, name in heads.items()}
        noises[label] = {name: short(median(m.noise for m in forms[name])) for name in forms}
        if length > 1:
            crossings[label] = {
                f"{exact}, {biased}": math.ceil(median(map(crossing, forms[exact], forms[biased])))
                for exact, biased in PAIRS
            }
    yield table("bias: median (worst), least cosine", biases)
    yield table("noise: median", noises)
    yield table("same error: exact form, biased form", crossings)


def draw(results: dict[str, Results], output: Path) -> None:
    """Draw the error against the number of completions, for both kinds of the longest completions."""
    steps = torch.logspace(0, 4, 60).tolist()
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("{} tokens", "at most {} tokens, of which one in three ends")
    for axes, title, of_kind in zip(panels, titles, results.values(), strict=True):
        length = max(length for distance, length in of_kind if distance == 1)
        for name, (colour, line, form) in LOOKS.items():
            moments = of_kind[1.0, length][name]
            heights = [median(relative_error(m, n) for m in moments) for n in steps]
            axes.plot(steps, heights, line, color=colour, label=f"{name}, {form}", linewidth=2.2)
        axes.set(xscale="log", yscale="log", xlabel="completions in a step")
        axes.set_title(title.format(length), loc="left")
    panels[0].set_ylabel("squared error of a step: E|g - grad|² / |grad|²")
    panels[0].legend(frameon=False)
    save(figure, output)


def main(
    output: Path = PAGE,
    figure: Path = RECIPES / "figures" / "distillation_forms.png",
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5),
    problems: int = 24,
) -> None:
    """Write the tables and the figure."""
    cases = [(1.0, length) for length in lengths]
    cases += [(distance, lengths[-1]) for distance in DISTANCES if distance != 1]
    results: dict[str, Results] = {}
    parts = [BEGIN]
    for kind, ends in KINDS.items():
        of_kind = results[kind] = {}
        for distance, length in cases:
            listed = [
                distillation_problem(seed, distance, length, ends) for seed in range(problems)
            ]
            measured = pd.DataFrame([measure(problem) for problem in listed]).to_dict("list")
            others = {name: [*map(form, listed)] for name, form in OTHERS.items()}
            of_kind[distance, length] = measured | others
        parts += [f"**{kind}:**", *tables(of_kind)]
    above, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    below = rest.partition(END)[2]
    output.write_text(above + "\n\n".join([*parts, END]) + below, encoding="utf-8")
    draw(results, figure)
    print(f"{output}: {problems} problems of each kind")


if __name__ == "__main__":
    tyro.cli(main)
