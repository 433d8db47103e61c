"""Draws what corrections leave of the gradient where a sampler's logits differ from the policy's by noise.

    python recipes/enumeration/samplers.py

Left is the bias beside the gradient of the policy's expected reward, right the noise: medians over 20
random problems, computed by enumeration. Look for the price of exactness: weights of whole sequences have no
bias and the most noise. `recipes/pages/explain/off_policy.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from pathlib import Path
from statistics import median

import tyro
from figures import save
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.lab import Perturbation, off_policy_moments, perturbed_problem

# The palette of Okabe and Ito.
CORRECTIONS = {
    "no correction": ({}, "#555555"),
    "token": ({"importance": "token"}, "#E69F00"),
    "geometric": ({"importance": "geometric"}, "#CC79A7"),
    "sequence, cap 2": ({"importance": "sequence", "importance_cap": 2.0}, "#56B4E9"),
    "sequence": ({"importance": "sequence"}, "#009E73"),
}
NOISES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def main(
    output: Path = Path("off_policy.png"), noises: tuple[float, ...] = NOISES, problems: int = 20
) -> None:
    """Print the numbers and write the figure."""
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    print("correction         noise of the logits   bias   noise of the gradient")
    for name, (fields, colour) in CORRECTIONS.items():
        lines: tuple[list[float], list[float]] = ([], [])
        for noise in noises:
            drawn = [perturbed_problem(seed, Perturbation(noise=noise)) for seed in range(problems)]
            moments = [off_policy_moments(Estimator(**fields), problem)[0] for problem in drawn]
            lines[0].append(median(m.relative_bias for m in moments))
            lines[1].append(median(m.noise for m in moments))
            print(f"{name:16}   {noise:19g}   {lines[0][-1]:4.2f}   {lines[1][-1]:21.1f}")
        for axes, heights in zip((left, right), lines, strict=True):
            axes.plot(noises, heights, color=colour, label=name)
    left.set(xlabel="noise on the sampler's logits", ylabel="|E g - grad J| / |grad J|")
    right.set(xlabel="noise on the sampler's logits", ylabel="tr Var g / |E g|^2", ylim=(0, None))
    left.set_title("bias", loc="left")
    right.set_title("noise, two completions per prompt", loc="left")
    left.legend(frameon=False)
    save(figure, output)


if __name__ == "__main__":
    tyro.cli(main)
