"""Compares the corrections for a sampler that differs from the policy, by enumeration.

    python recipes/enumeration/samplers.py
    python recipes/enumeration/samplers.py --sampler.noise 0 --sampler.temperature 0.8 --sampler.top-p 0.9

Two completions per prompt have at most three steps of three tokens, in 20 random problems. The table has the bias
beside the gradient of the policy's expected reward, and beside that of the sampler's, in its own logits. The figure
has bias and noise by the noise on the sampler's logits, as medians. Look for the price of exactness: weights of whole
sequences have no bias and the most noise. `recipes/pages/explain/off_policy.md` has the text.
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

CORRECTIONS = {
    "none": "rloo",
    "none, centred": "importance_centre=True",
    "token": "importance=token",
    "token, truncate 2": "importance=token,importance_cap=2.0",
    "token, mask 2": "importance=token,importance_cap=2.0,importance_bound=mask",
    "prefix": "importance=prefix",
    "prefix, clip 0.2": "importance=prefix,importance_clip=0.2",
    "geometric": "importance=geometric",
    "sequence, truncate 2": "importance=sequence,importance_cap=2.0",
    "sequence, mask 3": "importance=sequence,importance_cap=3.0,importance_bound=mask",
    "sequence": "importance=sequence",
}
# The palette of Okabe and Ito.
DRAWN = {
    "none": "#555555",
    "token": "#E69F00",
    "geometric": "#CC79A7",
    "sequence, truncate 2": "#56B4E9",
    "sequence": "#009E73",
}
NOISY = Perturbation(noise=0.3)
NOISES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def measured(name: str, sampler: Perturbation, problems: int) -> list[float]:
    """Return the bias to both gradients, each the median and the worst, and the median cosine and noise."""
    drawn = [perturbed_problem(seed, sampler) for seed in range(problems)]
    pairs = [off_policy_moments(Estimator.preset(CORRECTIONS[name]), problem) for problem in drawn]
    numbers = []
    for moments in zip(*pairs, strict=True):  # beside grad J(policy), and beside grad J(sampler)
        biases = [m.relative_bias for m in moments]
        numbers += [median(biases), max(biases)]
    policy = [beside_policy for beside_policy, _ in pairs]
    return [*numbers, median(m.cosine for m in policy), median(m.noise for m in policy)]


def main(
    sampler: Perturbation = NOISY,
    output: Path = Path("off_policy.png"),
    noises: tuple[float, ...] = NOISES,
    problems: int = 20,
) -> None:
    """Print the table of a sampler, and write the figure."""
    print("correction             off J(policy)  worst  off J(sampler)  worst  cosine  noise")
    for name in CORRECTIONS:
        numbers = measured(name, sampler, problems)
        print("{:22} {:13.3f} {:6.3f} {:15.3f} {:6.3f} {:7.3f} {:6.1f}".format(name, *numbers))
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in DRAWN.items():
        rows = [measured(name, Perturbation(noise=noise), problems) for noise in noises]
        left.plot(noises, [row[0] for row in rows], color=colour, label=name)
        right.plot(noises, [row[-1] for row in rows], color=colour)
    left.set(xlabel="noise on the sampler's logits", ylabel="|E g - grad J| / |grad J|")
    right.set(xlabel="noise on the sampler's logits", ylabel="tr Var g / |E g|^2", ylim=(0, None))
    left.set_title("bias", loc="left")
    right.set_title("noise, two completions per prompt", loc="left")
    left.legend(frameon=False)
    save(figure, output)


if __name__ == "__main__":
    tyro.cli(main)
