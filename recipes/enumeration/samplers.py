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

from functools import partial
from pathlib import Path

import tyro
from figures import save, show, table_of
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


def measured(name: str, sampler: Perturbation, seed: int) -> dict[str, float]:
    """Return the bias beside grad J(policy) and beside grad J(sampler), and cosine and noise beside the first."""
    estimator = Estimator.preset(CORRECTIONS[name])
    policy, of_sampler = off_policy_moments(estimator, perturbed_problem(seed, sampler))
    return {
        "off J(policy)": policy.relative_bias,
        "worst": policy.relative_bias,
        "off J(sampler)": of_sampler.relative_bias,
        "worst of it": of_sampler.relative_bias,
        "cosine": policy.cosine,
        "noise": policy.noise,
    }


def main(
    sampler: Perturbation = NOISY,
    output: Path = Path("off_policy.png"),
    noises: tuple[float, ...] = NOISES,
    problems: int = 20,
) -> None:
    """Print the table of a sampler, and write the figure."""
    rows = {name: partial(measured, name, sampler) for name in CORRECTIONS}
    show("What is left by correction", rows, problems)
    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, colour in DRAWN.items():
        samplers = {noise: partial(measured, name, Perturbation(noise=noise)) for noise in noises}
        curves = table_of(samplers, problems)
        left.plot(curves["off J(policy)"], color=colour, label=name)
        right.plot(curves["noise"], color=colour)
    left.set(xlabel="noise on the sampler's logits", ylabel="|E g - grad J| / |grad J|")
    right.set(xlabel="noise on the sampler's logits", ylabel="tr Var g / |E g|^2", ylim=(0, None))
    left.set_title("bias", loc="left")
    right.set_title("noise, two completions per prompt", loc="left")
    left.legend(frameon=False)
    save(figure, output)


if __name__ == "__main__":
    tyro.cli(main)
