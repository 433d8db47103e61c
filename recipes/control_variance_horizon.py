"""How the noise of a policy gradient grows with the horizon T: the bandit repeated T times, one theta.

The total return multiplies the score of every action by the rewards of all actions, though only its own
reward depends on it. The variance of one episode's gradient sample has a closed form (`gradient_variance` in
`tokenrl.control.bandit`). This recipe draws it, and measures it on sampled episodes with the estimator's own
loss, for the total return and the reward to go, each without a baseline and with `timestep_mean`, the mean of
the other episodes at the same timestep.

Found: without a baseline the variance grows like T^3 with either return; the reward to go only divides it by
3. The baseline removes one power of T: the variance then grows like T^2, and the reward to go has a quarter
of it. The gradient itself grows like T. So the number of episodes until the standard error is as small as the
gradient, Var[g] / E[g]^2, grows like T without a baseline (50 and 17 at T = 128). With a baseline it stops
growing, near 2 for the total return and 1/2 for the reward to go, because the actions of each pair still
disturb each other. These are limits; at short horizons lower powers of T matter, and from T = 64 to 128 the
exact slopes are 2.91, 2.89, 2.01 and 1.99. Where the mean reward happens to be 0 (--theta 0 --rewards 1 -1)
a baseline subtracts nothing, and both pairs of curves coincide.
"""

from dataclasses import dataclass
from itertools import product
from math import log
from pathlib import Path

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.control import bandit

COLOURS = {"none": "#D55E00", "mean": "#0072B2"}  # Okabe and Ito
DASHES = {"total": "-", "reward_to_go": "--"}
LABELS = {"total": "total return", "reward_to_go": "reward to go"}
KINDS = tuple(product(LABELS, COLOURS))  # returns, baseline
Found = dict[tuple[int, tuple[str, str]], tuple[float, float]]  # variance and standard error, by T and kind


@dataclass(frozen=True)
class Arguments:
    """Measure and draw the variance of four gradient estimators against the horizon."""

    output: Path = Path("variance_horizon.png")
    """Where the figure goes."""
    theta: float = -1.0
    """The parameter at which the gradient is taken; action 1 has probability sigmoid(theta)."""
    rewards: tuple[float, float] = bandit.REWARDS
    """Rewards of the two actions; they must differ, or there is no gradient."""
    horizons: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Actions per episode; two or more numbers, in rising order."""
    episodes: int = 2000
    """Episodes sampled for each horizon, and shared by the four estimators."""
    seed: int = 0
    """Seed of the sampled actions."""

    def __post_init__(self) -> None:
        if not self.horizons:
            raise ValueError("--horizons needs at least one value.")


def episode_gradients(
    estimator: Estimator, theta: float, actions: torch.Tensor, rewards: torch.Tensor
) -> torch.Tensor:
    """Differentiate the estimator's loss for N episodes [N, T]; returns each one's own sample of g, [N]."""
    copies = torch.full(
        (len(actions), 1), theta, dtype=torch.double, requires_grad=True
    )  # one for each episode
    mask = torch.ones(actions.shape, dtype=torch.double)
    advantages = estimator.advantages(rewards, mask, group_size=None).policy
    weights = estimator.token_weights(mask, max_length=None)  # 1 / N
    logprobs = torch.nn.functional.logsigmoid(torch.where(actions == 0, copies, -copies))
    (gradients,) = torch.autograd.grad(estimator.loss(logprobs, advantages, weights, mask), copies)
    return -len(actions) * gradients[:, 0]


def measure(
    arguments: Arguments, steps: int, generator: torch.Generator
) -> dict[tuple[str, str], torch.Tensor]:
    """Sample episodes of one length and return the gradients [N] of each estimator on them."""
    uniforms = torch.rand(arguments.episodes, steps, generator=generator, dtype=torch.double)
    actions = torch.where(uniforms < bandit.probability(arguments.theta), 0, 1)
    rewards = torch.tensor(arguments.rewards, dtype=torch.double)[actions]
    found = {}
    for returns, baseline in KINDS:
        estimator = Estimator(returns=returns, baseline={"none": "none", "mean": "timestep_mean"}[baseline])
        found[returns, baseline] = episode_gradients(estimator, arguments.theta, actions, rewards)
    return found


def with_error(g: torch.Tensor) -> tuple[float, float]:
    """Estimate the variance of g [N] and its standard error: `sqrt((m_4 - Var^2) / N)`."""
    variance = g.var()
    fourth = (g - g.mean()).pow(4).mean()
    return float(variance), float((fourth - variance**2).clamp(min=0).div(len(g)).sqrt())


def exact(arguments: Arguments, steps: int, kind: tuple[str, str]) -> float:
    returns, baseline = kind
    settings = {"returns": returns, "baseline": baseline}
    return float(bandit.gradient_variance(arguments.theta, steps, arguments.rewards, **settings))


def square_of_mean(arguments: Arguments, steps: int) -> float:
    return float(bandit.expected_gradient(arguments.theta, steps, arguments.rewards)) ** 2


def print_slopes(arguments: Arguments, found: Found) -> None:
    """Print by which power of T the variance grows between the last two horizons."""
    short, long = arguments.horizons[-2:]
    print(f"\nslope of log Var[g] over log T, from T = {short} to {long}")
    for kind in KINDS:
        wanted = log(exact(arguments, long, kind) / exact(arguments, short, kind)) / log(long / short)
        (a, error_a), (b, error_b) = found[short, kind], found[long, kind]
        error = ((error_a / a) ** 2 + (error_b / b) ** 2) ** 0.5 / log(long / short)
        print(
            f"{kind[0]:13} {kind[1]:9} exact {wanted:5.2f}   "
            f"measured {log(b / a) / log(long / short):5.2f} ± {2 * error:.2f}"
        )


def draw(axes: Axes, arguments: Arguments, found: Found, *, relative: bool) -> None:
    def unit(steps: int) -> float:
        return square_of_mean(arguments, steps) if relative else 1.0

    every = range(arguments.horizons[0], arguments.horizons[-1] + 1)
    for returns, baseline in KINDS:
        color, kind = COLOURS[baseline], (returns, baseline)
        curve = [exact(arguments, steps, kind) / unit(steps) for steps in every]
        axes.plot(every, curve, DASHES[returns], color=color, linewidth=2)
        points = [found[steps, kind] for steps in arguments.horizons]
        values = [v / unit(t) for t, (v, _) in zip(arguments.horizons, points, strict=True)]
        errors = [2 * e / unit(t) for t, (_, e) in zip(arguments.horizons, points, strict=True)]
        face = color if returns == "total" else "white"
        axes.errorbar(arguments.horizons, values, errors, fmt="o", color=color, markerfacecolor=face,
                      capsize=3, markersize=6)  # fmt: skip
        axes.annotate(LABELS[returns], (every[-1], curve[-1]), (10, 0), textcoords="offset points",
                      color=color, va="center", annotation_clip=False)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(arguments.horizons, [str(steps) for steps in arguments.horizons])
    axes.set_xlabel("horizon T (actions an episode)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EAEAEA", linewidth=0.8)


def draw_both(arguments: Arguments, found: Found) -> Figure:
    figure = Figure(figsize=(13, 5.2), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, arguments, found, relative=False)
    draw(right, arguments, found, relative=True)
    left.set_ylabel("Var[g] of one episode ((reward per unit of theta)²)")
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("Var[g] / E[g]² (episodes until standard error = gradient)")
    left.set_title(
        "A baseline turns T³ into T²; reward to go only changes the factor", loc="left", fontsize=11
    )
    right.set_title(
        "Noise against signal: grows like T without a baseline, else stops growing", loc="left", fontsize=11
    )
    legend = (
        ("no baseline", COLOURS["none"]),
        ("baseline: mean at each timestep", COLOURS["mean"]),
        (f"lines: exact; points: {arguments.episodes} episodes, ± 2 standard errors", "#555555"),
    )
    for line, (text, color) in enumerate(legend):
        left.text(0.02, 0.97 - 0.055 * line, text, transform=left.transAxes, va="top", color=color)
    return figure


def main(arguments: Arguments) -> None:
    generator = torch.Generator().manual_seed(arguments.seed)
    found: Found = {}
    print("  T   returns       baseline       Var[g]     measured   ± 2 s.e.   Var[g] / E[g]^2")
    for steps in arguments.horizons:
        for kind, g in measure(arguments, steps, generator).items():
            variance, error = found[steps, kind] = with_error(g)
            wanted = exact(arguments, steps, kind)
            print(f"{steps:4}  {kind[0]:13} {kind[1]:9} {wanted:12.4f} {variance:12.4f} {2 * error:10.4f} "
                  f"{wanted / square_of_mean(arguments, steps):17.3f}")  # fmt: skip
    print_slopes(arguments, found)
    draw_both(arguments, found).savefig(arguments.output)
    print(f"figure: {arguments.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
