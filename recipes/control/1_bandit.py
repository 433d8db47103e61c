"""REINFORCE by hand, on a bandit of two actions and one parameter, beside the estimator and autograd.

The policy takes action 1 (reward 1) with probability s = sigmoid(theta), else action 2 (reward 0). The first
table shows single updates with learning rate 1: the score of the action, its gradient sample g = reward *
score, and the new theta. Action 2 has reward 0, so its gradient sample is 0 too. The second table compares
two ways to the same number: the derivative of the expected reward, s (1 - s), and the mean of N samples of g.
The third repeats the bandit T times with one theta and compares the variance of an episode's gradient sample
with its closed form, for the total return and the reward to go, without a baseline and with `timestep_mean`.

Look for: the numbers by hand and by autograd are the same. In bandit.png the signal E[g] is largest where the
policy is undecided (theta = 0, there 0.25 with sd 0.25, so 100 samples leave a standard error of 0.025), but
the noise sd(g) = sqrt(s (1 - s)^3) is largest at theta = -1.1, where the good action has probability 1/4.
The ratio of noise to signal is exp(-theta / 2): the worse the policy, the less one sample tells.

In variance_horizon.png the variance grows like T^3 without a baseline, with either return; the reward to go
only divides it by 3. The baseline removes one power of T, and the reward to go then has a quarter. The
gradient itself grows like T, so Var[g] / E[g]^2, the episodes until the standard error is as small as the
gradient, grows like T without a baseline (50 and 17 at T = 128) and stops growing with one, near 2 and 1/2.
From T = 64 to 128 the exact slopes are 2.91, 2.89, 2.01 and 1.99.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import tyro
from curves import save
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tokenrl import Estimator
from tokenrl.control import Bandit

# Okabe and Ito
BLUE = "#0072B2"
ORANGE = "#D55E00"
CASES = ((-1.0, 1), (-1.0, 0), (0.0, 0))  # theta, and the action sampled there: 0 is action 1
KINDS = tuple(product(("total", "reward_to_go"), ("none", "timestep_mean")))  # returns, baseline
THETA = -1.0  # where the variance is measured over the horizon
HORIZONS = (1, 2, 4, 8, 16, 32, 64, 128)  # actions per episode in the third part
SAMPLES = 100  # actions sampled at each theta in the second part
EPISODES = 2000  # sampled for each horizon, and shared by the four estimators
COLUMNS = ("Var[g]", "measured", "± 2 s.e.", "Var[g] / E[g]^2")


def probability(theta: float | Tensor) -> Tensor:
    """Return the probability of action 1, `s = sigmoid(theta)`."""
    return torch.sigmoid(torch.as_tensor(theta, dtype=torch.double))


def score(theta: float, action: int | Tensor) -> Tensor:
    """Return the derivative of an action's logprob: 1 - s for action 1 (index 0), -s for action 2."""
    return (torch.as_tensor(action) == 0).double() - probability(theta)


def expected_gradient(theta: float | Tensor, steps: int = 1) -> Tensor:
    """Return the gradient of the expected return of an episode of T steps: `E[g] = T s (1 - s)`."""
    s = probability(theta)
    return steps * s * (1 - s)


def gradient_variance(
    theta: float | Tensor, steps: int = 1, returns: str = "total", baseline: str = "none"
) -> Tensor:
    """Return the variance of one episode's gradient sample `g = sum_t (G_t - b_t) x_t`, x_t the score at t.

    With `v = s (1 - s)`, a reward is `s + x_t`, and a score has only two values, so `x_t^2 = v + (1 - 2 s)
    x_t`. Sorted by powers of different scores, which are uncorrelated, the sample is
    `T v + sum_t (m_t - b_t + 1 - 2 s) x_t + k sum_{t<u} x_t x_u`, thus

        Var[g] = v sum_t (m_t - b_t + 1 - 2 s)^2 + k^2 v^2 T (T - 1) / 2

    For the total return `m_t = E[G_t] = T s` and k = 2; for the reward to go `m_t = (T - t) s` and k = 1. The
    baseline `b_t = m_t` takes the T^3 out of the first sum. For T = 1 without a baseline: `s (1 - s)^3`.
    """
    s = probability(theta)[..., None]  # [*N, 1], to broadcast over [T]
    v = s * (1 - s)
    rewards = torch.arange(steps, 0, -1, dtype=torch.double)  # in G_t, [T]
    k = 1
    if returns == "total":
        rewards = torch.full_like(rewards, steps)
        k = 2
    mean = s * rewards if baseline == "none" else 0 * rewards
    single = v * (mean + 1 - 2 * s).square()  # [*N, T]
    pairs = k**2 * v.square() * steps * (steps - 1) / 2
    return single.sum(-1) + pairs[..., 0]


def episode_gradients(estimator: Estimator, theta: float, actions: Tensor) -> Tensor:
    """Differentiate the estimator's loss for N episodes [N, T]; returns each one's own sample of g, [N]."""
    rewards = (actions == 0).double()
    copies = torch.full((len(actions), 1), theta, dtype=torch.double, requires_grad=True)
    mask = torch.ones(actions.shape, dtype=torch.double)
    advantages = estimator.advantages(rewards, mask, group_size=None).policy
    weights = estimator.token_weights(mask, max_length=None)  # 1 / N
    logprobs = torch.nn.functional.logsigmoid(torch.where(actions == 0, copies, -copies))
    (gradients,) = torch.autograd.grad(estimator.loss(logprobs, advantages, weights, mask), copies)
    return 0.0 - len(actions) * gradients[:, 0]  # for ascent; 0 where the reward is 0, not -0


def sampled_actions(theta: float, generator: torch.Generator, *shape: int) -> Tensor:
    uniforms = torch.rand(*shape, generator=generator, dtype=torch.double)
    return torch.where(uniforms < probability(theta), 0, 1)


def single_updates() -> None:
    environment = Bandit()
    estimator = Estimator.preset("reinforce")
    print(
        "  theta   P(a=1)  action  reward    score   g by hand  g by autograd  theta + lr g   P(a=1)"
    )
    for theta, action in CASES:
        environment.reset()
        reward = environment.step(action)[1]
        x = float(score(theta, action))
        by_hand = 0.0 + reward * x
        by_autograd = float(episode_gradients(estimator, theta, torch.tensor([[action]])))
        after = theta + by_hand
        print(
            f"{theta:7.4f} {probability(theta):8.4f} {action + 1:7} {reward:7.0f} {x:8.4f} {by_hand:11.4f} "
            f"{by_autograd:14.4f} {after:13.4f} {probability(after):8.4f}"
        )


def sampled_gradients(generator: torch.Generator) -> dict[float, Tensor]:
    """Print E[g] by formula and by sampling; returns the gradient samples [N] by theta."""
    gradients = {}
    print(f"\nN = {SAMPLES}")
    print("  theta     E[g]   mean of g   Var[g]    sd   standard error   off, in s.e.")
    for theta in (x / 2 for x in range(-6, 7)):
        actions = sampled_actions(theta, generator, SAMPLES)
        g = (actions == 0) * score(theta, actions)
        gradients[theta] = g
        mean = float(g.mean())
        exact = float(expected_gradient(theta))
        variance = float(gradient_variance(theta))
        error = (variance / SAMPLES) ** 0.5
        print(
            f"{theta:7.1f} {exact:8.4f} {mean:11.4f} {variance:8.4f} {variance**0.5:6.3f} {error:15.4f} "
            f"{(mean - exact) / error:14.1f}"
        )
    return gradients


def variances(generator: torch.Generator) -> pd.DataFrame:
    """Print the variance of each estimator over the horizon, exact and measured, and the slopes of the exact one."""
    rows = []
    for steps in HORIZONS:
        actions = sampled_actions(THETA, generator, EPISODES, steps)
        signal = float(expected_gradient(THETA, steps))
        for kind in KINDS:
            returns, baseline = kind
            g = episode_gradients(Estimator(returns=returns, baseline=baseline), THETA, actions)
            measured, error = with_error(g)
            exact = float(gradient_variance(THETA, steps, *kind))
            rows.append((steps, *kind, exact, measured, 2 * error, exact / signal**2))
    table = pd.DataFrame(rows, columns=["T", "returns", "baseline", *COLUMNS])
    print(f"\n{table.to_string(index=False, float_format='{:.3f}'.format)}")
    exact = table.pivot(index="T", columns=["returns", "baseline"], values=COLUMNS[0])
    slopes = np.log2(exact).diff().iloc[-1]  # the horizon doubles from row to row
    print(f"\nslope of log Var[g] over log T, from T = {HORIZONS[-2]} to {HORIZONS[-1]}")
    print(slopes.to_string(float_format="{:.2f}".format))
    return table


def with_error(g: Tensor) -> tuple[float, float]:
    """Estimate the variance of g [N] and its standard error: `sqrt((m_4 - Var^2) / N)`."""
    variance = g.var()
    fourth = (g - g.mean()).pow(4).mean()
    return float(variance), float((fourth - variance**2).clamp(min=0).div(len(g)).sqrt())


def draw_bandit(axes: Axes, gradients: dict[float, Tensor]) -> None:
    """Draw signal and noise over theta: lines by formula, points by sampling."""
    theta = torch.linspace(-4, 4, 401, dtype=torch.double)
    axes.plot(theta, expected_gradient(theta), color=BLUE, label="E[g] = s(1 - s)")
    axes.plot(theta, gradient_variance(theta).sqrt(), color=ORANGE, label="sd(g) = √(s(1 - s)³)")
    for x, g in gradients.items():
        variance, error = with_error(g)
        sd = variance**0.5
        axes.errorbar(x, float(g.mean()), 2 * sd / SAMPLES**0.5, fmt="o", color=BLUE, capsize=3)
        # The error of an sd is the error of the variance over twice the sd.
        axes.errorbar(x, sd, error / sd if sd else 0.0, fmt="D", color=ORANGE, capsize=3)
    axes.set(xlabel="theta (log odds of the rewarded action)", ylabel="gradient sample g")
    axes.legend(frameon=False, title=f"points: {SAMPLES} samples each, ± 2 standard errors")


def draw_horizon(axes: Axes, table: pd.DataFrame) -> None:
    """Draw the variance over the horizon: lines by formula, points by sampling."""
    exact, measured, error, _ = COLUMNS
    for (returns, baseline), rows in table.groupby(["returns", "baseline"]):
        colour = ORANGE if baseline == "none" else BLUE
        line = "-" if returns == "total" else "--"
        axes.plot(rows["T"], rows[exact], line, color=colour, label=f"{returns}, {baseline}")
        axes.errorbar(rows["T"], rows[measured], rows[error], fmt="o", color=colour, capsize=3)
    axes.set(xscale="log", yscale="log", xlabel="T, actions per episode")
    axes.set_ylabel("Var[g] of one episode")
    axes.legend(frameon=False, title="points: measured, ± 2 standard errors")


def main(output_dir: Path = Path(".")) -> None:
    """Compute the bandit's gradient by hand and by the estimator, and its variance over the horizon.

    Args:
        output_dir: Where the figures go: bandit.png and variance_horizon.png.
    """
    single_updates()
    gradients = sampled_gradients(torch.Generator().manual_seed(0))
    table = variances(torch.Generator().manual_seed(0))
    parts = {"bandit": (draw_bandit, gradients), "variance_horizon": (draw_horizon, table)}
    for name, (draw, numbers) in parts.items():
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        draw(figure.subplots(), numbers)
        save(figure, output_dir / f"{name}.png")


if __name__ == "__main__":
    tyro.cli(main)
