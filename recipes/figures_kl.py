"""Draws the value and the gradient of estimates of KL(pi || ref), as the policy leaves its reference.

With `l = log pi - log ref` at each token: k1 = l, k2 = l^2/2, k3 = exp(-l) - 1 + l (Schulman's names);
`k2_sequence` squares the sum of l over the completion; `full_path` gives each token the sum of l from there
on. All expectations are sums over every completion, in float64, of the functions that training calls.

Look for: a good estimate of the value need not have the right gradient. In the loss (differentiated), k1 has
the right value, and its expected gradient is 0. k2 and k3 miss what an action does to later tokens, and k3
(GRPO) has the gradient of another divergence, KL(ref || pi) at each token. Only the two estimates that use
the whole completion are exact. In the reward (a number), k1 is exact, and near the reference k2 and k3 have
hardly any gradient.
"""

from pathlib import Path

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tokenrl.core import PER_TOKEN
from tokenrl.lab import all_completions

EVERY = all_completions(vocabulary=3, length=3)  # 15 completions of 1 to 3 tokens
COLOURS = {
    "k1": "#0072B2",
    "k2": "#E69F00",
    "k3": "#D55E00",
    "k2_sequence": "#009E73",
    "full_path": "#CC79A7",
}


def table_logprobs(logits: Tensor) -> Tensor:
    """Logprobs [M, T] of every completion's tokens, from one row of logits per prefix."""
    return logits.log_softmax(-1)[EVERY.prefix, EVERY.ids] * EVERY.mask


def measure(logits: Tensor, reference: Tensor) -> tuple[float, dict[tuple[str, str], tuple[float, float]]]:
    """Return the KL, and by (estimate, place) the expected value and the relative error of the gradient."""
    logits = logits.clone().requires_grad_()
    logprobs, ref = table_logprobs(logits), table_logprobs(reference)
    chances = logprobs.sum(-1).exp()
    kl = (chances * (logprobs - ref).sum(-1)).sum()
    (truth,) = torch.autograd.grad(kl, logits, retain_graph=True)
    found = {}
    for name, estimate in PER_TOKEN.items():
        values = estimate(logprobs, ref).sum(-1)  # [M]
        value = float((chances * values).sum().detach())
        for place, objective in (
            ("loss", chances.detach() * values),  # the completions are fixed, the estimate is differentiated
            ("reward", chances * values.detach()),  # E[k S]: the estimate is a number
        ):
            if place == "reward" and name in ("k2_sequence", "full_path"):
                continue  # these two are meant for the loss only
            (slope,) = torch.autograd.grad(objective.sum(), logits, retain_graph=True)
            found[name, place] = value, float((slope - truth).norm() / truth.norm())
    return float(kl.detach()), found


def curves(seed: int) -> tuple[list[float], list[dict[tuple[str, str], tuple[float, float]]]]:
    """Measure along a line of logits that begins at the reference."""
    draw = torch.Generator().manual_seed(seed)
    reference, direction = torch.randn(2, len(EVERY.prefixes), 3, generator=draw, dtype=torch.double)
    steps = torch.logspace(-1.1, 0.55, 60, dtype=torch.double)
    points = [measure(reference + step * direction, reference) for step in steps]
    return [kl for kl, _ in points], [found for _, found in points]


def panel(
    axes: Axes, kls: list[float], lines: dict[str, list[float]], labels: dict[str, tuple[float, str]]
) -> None:
    for name, values in lines.items():
        axes.plot(kls, values, color=COLOURS[name], linewidth=2.2)
    for name, (height, text) in labels.items():
        axes.annotate(text, (1.03, height), xycoords=("axes fraction", "data"), color=COLOURS[name],
                      va="center", fontsize=9.5, fontweight="bold")  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
    axes.set_xlim(kls[0], kls[-1])
    axes.set_xlabel("true KL(π ‖ ref), nats a completion")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EAEAEA", linewidth=0.8)


def draw(kls: list[float], points: list[dict[tuple[str, str], tuple[float, float]]]) -> Figure:
    figure = Figure(figsize=(13, 4.4), dpi=100, layout="constrained")
    value, loss, reward = figure.subplots(1, 3)

    def lines(place: str, which: int, names: list[str]) -> dict[str, list[float]]:
        return {name: [point[name, place][which] for point in points] for name in names}

    ratios = lines("loss", 0, ["k2", "k2_sequence", "k1"])
    ratios = {name: [v / kl for v, kl in zip(vs, kls, strict=True)] for name, vs in ratios.items()}
    panel(value, kls, ratios, {"k1": (1, "k1, k3,\nfull_path"), "k2": (ratios["k2"][-1], "k2"),
                               "k2_sequence": (ratios["k2_sequence"][-1], "k2_\nsequence")})  # fmt: skip
    value.set_title("Value: expectation / KL", loc="left")
    errors = lines("loss", 1, ["k1", "k2", "k3", "full_path", "k2_sequence"])
    panel(loss, kls, errors, {
        "k1": (1, "k1: no pull"),
        "k2": (errors["k2"][-1], "k2"),
        "k3": (errors["k3"][-1], "k3"),
        "k2_sequence": (0, "k2_sequence,\nfull_path"),
    })  # fmt: skip
    loss.set_title("Gradient, in the loss: relative error", loc="left")
    errors = lines("reward", 1, ["k2", "k3", "k1"])
    panel(reward, kls, errors, {name: (errors[name][-1], name) for name in errors})
    reward.set_title("Gradient, in the reward: relative error", loc="left")
    for axes in (value, loss, reward):
        axes.set_ylim(bottom=-0.03)
    return figure


def main(output: Path = Path("kl.png"), seed: int = 1) -> None:
    kls, points = curves(seed)
    print("relative error of the gradient:\n    KL " + " ".join(f"{n + ' ' + p:>18}" for n, p in points[0]))
    for place in range(4, len(kls), 11):
        print(f"{kls[place]:6.3f} " + " ".join(f"{error:18.2e}" for _, error in points[place].values()))
    draw(kls, points).savefig(output)
    print(f"figure: {output}")


if __name__ == "__main__":
    tyro.cli(main)
