"""REINFORCE by hand, on a bandit of two actions and one parameter, beside the estimator and autograd.

The policy takes action 1 (reward 1) with probability s = sigmoid(theta), else action 2 (reward 0). The first
table shows single updates with learning rate 1: the score of the action, its gradient sample g = reward *
score, and the new theta. Action 2 has reward 0, so its gradient sample is 0 too. The second table compares
two ways to the same number: the derivative of the expected reward, s (1 - s), and the mean of N samples of g.

Look for: the numbers by hand and by autograd are the same. In the figure the signal E[g] is largest where the
policy is undecided (theta = 0, there 0.25 with sd 0.25, so 100 samples leave a standard error of 0.025), but
the noise sd(g) = sqrt(s (1 - s)^3) is largest at theta = -1.1, where the good action has probability 1/4.
The ratio of noise to signal is exp(-theta / 2): the worse the policy, the less one sample tells.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tokenrl import Estimator
from tokenrl.control import bandit

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#8A8A8A"  # Okabe and Ito
CASES = ((-1.0, 1), (-1.0, 0), (0.0, 0))  # theta, and the action sampled there: 0 is action 1
REINFORCE = Estimator.preset("reinforce")


@dataclass(frozen=True)
class Arguments:
    """Compute the bandit's gradient by hand and by the estimator, and draw it over theta."""

    output: Path = Path("bandit.png")
    """Where the figure goes."""
    samples: int = 100
    """Actions sampled at each theta."""
    learning_rate: float = 1.0
    """Learning rate of the single updates."""
    seed: int = 0
    """Seed of the sampled actions."""


def by_estimator(theta: float, actions: torch.Tensor, rewards: torch.Tensor) -> float:
    """Differentiate the loss of N episodes of one action each, [N], and negate the gradient, for ascent."""
    parameter = torch.tensor(theta, dtype=torch.double, requires_grad=True)
    mask = torch.ones(len(actions), 1, dtype=torch.double)  # [N, T]: each episode is one action
    advantages = REINFORCE.advantages(rewards, mask, group_size=None).policy  # [N], the rewards themselves
    weights = REINFORCE.token_weights(mask, max_length=None)  # 1 / N each
    logits = torch.stack([parameter, torch.zeros_like(parameter)])  # their softmax is sigmoid(theta)
    logprobs = logits.log_softmax(0)[actions][:, None]
    (gradient,) = torch.autograd.grad(REINFORCE.loss(logprobs, advantages, weights, mask), parameter)
    return 0.0 - float(gradient)  # 0 where the reward is 0, not -0


def single_updates(learning_rate: float) -> None:
    environment = bandit.Bandit()
    print("  theta   P(a=1)  action  reward    score   g by hand  g by autograd  theta + lr g   P(a=1)")
    for theta, action in CASES:
        environment.reset()
        reward = environment.step(action)[1]
        score = float(bandit.score(theta, action))
        by_hand = 0.0 + reward * score
        by_autograd = by_estimator(theta, torch.tensor([action]), torch.tensor([reward]).double())
        after = theta + learning_rate * by_hand
        before, then = float(bandit.probability(theta)), float(bandit.probability(after))
        print(
            f"{theta:7.4f} {before:8.4f} {action + 1:7} {reward:7.0f} {score:8.4f} {by_hand:11.4f} "
            f"{by_autograd:14.4f} {after:13.4f} {then:8.4f}"
        )


def two_ways(samples: int, generator: torch.Generator) -> dict[float, torch.Tensor]:
    """Print E[g] by formula and by sampling; returns the gradient samples [N] by theta."""
    rewards, found = torch.tensor(bandit.REWARDS, dtype=torch.double), {}
    print(f"\nN = {samples}")
    print("  theta     E[g]   mean of g  by autograd   Var[g]    sd   standard error   off, in s.e.")
    for theta in (x / 2 for x in range(-6, 7)):
        uniforms = torch.rand(samples, generator=generator, dtype=torch.double)
        actions = torch.where(uniforms < bandit.probability(theta), 0, 1)
        g = found[theta] = bandit.gradient_sample(theta, actions)
        mean, autograd = float(g.mean()), by_estimator(theta, actions, rewards[actions])
        exact, variance = float(bandit.expected_gradient(theta)), float(bandit.gradient_variance(theta))
        error = float(bandit.standard_error(theta, samples))
        print(
            f"{theta:7.1f} {exact:8.4f} {mean:11.4f} {autograd:12.4f} {variance:8.4f} {variance**0.5:6.3f} "
            f"{error:15.4f} {(mean - exact) / error:14.1f}"
        )
    return found


def error_of_sd(g: torch.Tensor) -> float:
    """Estimate the standard error of a standard deviation: `sqrt((m_4 - sd^4) / N) / (2 sd)`."""
    centred, sd = g - g.mean(), g.std()
    if sd == 0:
        return 0.0
    return float(((centred**4).mean() - sd**4).clamp(min=0).div(len(g)).sqrt() / (2 * sd))


def draw(axes: Axes, found: dict[float, torch.Tensor], samples: int) -> None:
    theta = torch.linspace(-4, 4, 401, dtype=torch.double)
    signal, noise = bandit.expected_gradient(theta), bandit.gradient_sd(theta)
    axes.plot(theta, signal, color=BLUE, linewidth=2.2)
    axes.plot(theta, noise, color=ORANGE, linewidth=2.2)
    means, sds = [float(g.mean()) for g in found.values()], [float(g.std()) for g in found.values()]
    errors = [2 * sd / samples**0.5 for sd in sds]
    axes.errorbar(list(found), means, errors, fmt="o", color=BLUE, capsize=3, markersize=8)
    errors = [2 * error_of_sd(g) for g in found.values()]
    axes.errorbar(list(found), sds, errors, fmt="D", color=ORANGE, markerfacecolor="white", capsize=3)
    axes.annotate("sd(g) = √(s(1 - s)³)", (-1.1, 0.325), (-95, 28), textcoords="offset points", color=ORANGE)
    axes.annotate("E[g] = s(1 - s)", (1.1, 0.19), (14, 10), textcoords="offset points", color=BLUE)
    for x, top, chance in ((0.0, 0.25, "1/2"), (-1.0986, 0.3248, "1/4")):
        axes.plot([x, x], [0, top], ":", color=GREY, linewidth=1)
        axes.annotate(f"P(a=1) = {chance}", (x, 0), (4, 6), textcoords="offset points", color="#555555")
    axes.set_ylim(0, 0.45)
    axes.set_xlim(-4, 4)
    axes.set_xlabel("theta (log odds of the rewarded action)")
    axes.set_ylabel("gradient sample g (reward per unit of theta)")
    axes.set_title("The signal is largest for an undecided policy, the noise for a bad one", loc="left")
    axes.text(0.99, 0.97, f"points: {samples} samples each, ± 2 standard errors", transform=axes.transAxes,
              ha="right", va="top", color="#555555", fontsize=9)  # fmt: skip
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#EAEAEA", linewidth=0.8)


def main(arguments: Arguments) -> None:
    single_updates(arguments.learning_rate)
    found = two_ways(arguments.samples, torch.Generator().manual_seed(arguments.seed))
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    draw(figure.subplots(), found, arguments.samples)
    figure.savefig(arguments.output)
    print(f"figure: {arguments.output}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
