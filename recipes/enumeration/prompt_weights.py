"""Says what weights of prompts do to the direction and to the noise of a gradient, by enumeration in float64.

    python recipes/enumeration/prompt_weights.py

Each of 18 prompts has one parameter of its own, the logit of its probability p of a right answer, and a step draws one
prompt with eight completions under RLOO. Look at `noise`, the second moment of the step over the square of its mean,
and at `cosine`, that of the mean to the gradient of the mean reward over all prompts.
`recipes/pages/explain/rewards.md` has the text.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import numpy as np
import pandas as pd
import tyro
from scipy import stats

PROBLEMS = {
    "15 prompts of 18 with p = .02, three of .5": [0.02] * 15 + [0.5] * 3,
    "15 prompts of 18 with p = .02, .2, .5 and .8": [0.02] * 15 + [0.2, 0.5, 0.8],
    "p even from .05 to .95": np.linspace(0.05, 0.95, 18).tolist(),
    "p from .001 to .5, by equal factors": np.geomspace(0.001, 0.5, 18).tolist(),
    "9 prompts of 18 with p = .001, nine of .5": [0.001] * 9 + [0.5] * 9,
}


def moments(p: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the second moment of RLOO's gradient of each prompt [n].

    With k right answers of G it is k (G - k) / (G (G - 1)) in the logit, as RLOO's weights of right and wrong answers
    are (G - k) / (G - 1) and -k / (G - 1), and their scores 1 - p and -p.
    """
    right = np.arange(group_size + 1)
    chances = stats.binom.pmf(right, group_size, p[:, None])
    gradients = right * (group_size - right) / (group_size * (group_size - 1))
    return chances @ gradients, chances @ gradients**2


def main(group_size: int = 8) -> None:
    """Print a table for each set of prompts.

    Args:
        group_size: completions of a prompt.
    """
    for name, probabilities in PROBLEMS.items():
        p = np.array(probabilities)
        means, second = moments(p, group_size)
        variance = p * (1 - p) / (p * (1 - p)).sum()
        floor = (variance + 1 / len(p)) / 2
        best = np.sqrt(second) / np.sqrt(second).sum()
        uniform = np.full_like(p, 1 / len(p))
        rows = {}
        for chances, drawn in {
            "uniform": uniform,
            "variance": variance,
            "variance, half uniform": floor,
            "of least noise": best,
        }.items():
            for correction, factors in {
                "weighted": np.ones_like(p),
                "inverse": 1 / (len(p) * drawn),
            }.items():
                mean = drawn * factors * means
                square = (drawn * factors**2 * second).sum()
                cosine = mean @ means / np.sqrt(mean @ mean * (means @ means))
                rows[chances, correction] = {"noise": square / (mean @ mean), "cosine": cosine}
        print(f"{name}\n{pd.DataFrame(rows).T.to_string(float_format='{:.3f}'.format)}\n")


if __name__ == "__main__":
    tyro.cli(main)
