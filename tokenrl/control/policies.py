"""Policies of agents: layers, a head that gives the distribution of actions, and perhaps a critic.

A policy is saved as policy.json, which holds its shape, and policy.safetensors, which holds its weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from tokenrl.core.losses import entropy_of, score_norm_of
from tokenrl.errors import Refused, read_file, refusing
from tokenrl.files import model_directory, write_json

LOG_STD_RANGE = (-20.0, 2.0)
"""The log std of a Gaussian is clamped to this range, so that its density stays finite."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


@dataclass(frozen=True)
class Shape:
    """The layers of a policy.

    Attributes:
        observation_size: O, the length of an observation, without a mask of actions.
        head: a `softmax` over A actions, or a diagonal `gaussian` over vectors of D numbers.
        action_size: A or D.
        hidden: units of each hidden layer; with no layer the policy is linear in the observations.
        activation: activation function between layers.
        critic: None, a `separate` network with the same layers, or one more output (`shared`).
        normalize_observations: shift and scale observations by the mean and std of those seen so far.
        initial_weights: `orthogonal` (Saxe et al. 2014) without biases, near 0 for the head, so that the
            first policy is nearly uniform; or weights and biases `uniform` between -1/sqrt(n) and 1/sqrt(n)
            for n inputs, as PyTorch's own layers begin.
        action_masks: whether the actions of a softmax are drawn from those that the environment allows. A mask of
            them, with 1 where an action is allowed and else 0, then follows each observation: [M, O + A].
    """

    observation_size: int
    head: Literal["softmax", "gaussian"]
    action_size: int
    hidden: tuple[int, ...] = (64,)
    activation: Literal["tanh", "relu"] = "tanh"
    critic: Literal["separate", "shared"] | None = None
    normalize_observations: bool = False
    initial_weights: Literal["orthogonal", "uniform"] = "orthogonal"
    action_masks: bool = False


class Scored(NamedTuple):
    """Log-probabilities of M actions, with entropies and squared score norms, each [M]."""

    logprobs: Tensor
    entropy: Tensor
    score_norms: Tensor
    """|d logprob / d (logits, or mean and log std)|^2, without gradient."""


class ObservationScale(nn.Module):
    """Running mean and standard deviation of observations (Chan et al. 1979), saved with the policy."""

    mean: Tensor
    squares: Tensor
    count: Tensor

    def __init__(self, size: int) -> None:
        """Begin without observations; until the first `update`, `forward` changes nothing."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def update(self, observations: Tensor) -> None:
        """Include observations [M, O] in mean and standard deviation."""
        values = observations.double()
        count = self.count + len(values)
        shift = values.mean(0) - self.mean
        # Squared deviations of both sets together: those within each set, and that between their means.
        between = shift.square() * self.count * len(values) / count
        self.squares += (values - values.mean(0)).square().sum(0) + between
        self.mean += shift * len(values) / count
        self.count.copy_(count)

    def forward(self, observations: Tensor) -> Tensor:
        """Shift and scale observations, and clamp them to ten standard deviations."""
        if self.count == 0:
            return observations
        deviation = (self.squares / self.count).sqrt().clamp(min=1e-4)
        return ((observations - self.mean) / deviation).clamp(-10, 10).to(observations.dtype)


class Policy(nn.Module):
    """Distribution of actions given an observation, with a critic if the estimator needs one.

    Attributes:
        shape: its layers.
        scale: shifts and scales the observations, or leaves them as they are.
        body: the hidden layers.
        head: the layer that gives the parameters of the distribution.
        critic: a network of its own, or with `shared` a layer upon the body; None without a critic.
    """

    def __init__(self, shape: Shape, generator: torch.Generator | None = None) -> None:
        """Draw the initial weights."""
        super().__init__()
        self.shape = shape
        self.scale: Any = nn.Identity()
        if shape.normalize_observations:
            self.scale = ObservationScale(shape.observation_size)
        width = shape.hidden[-1] if shape.hidden else shape.observation_size
        outputs = shape.action_size
        if shape.head == "gaussian":
            outputs *= 2  # means and log stds
        self.body = _layers(shape, generator)
        self.head = _linear(shape, width, outputs, 0.01, generator)
        self.critic: Any = None
        if shape.critic is not None:
            self.critic = _linear(shape, width, 1, 1.0, generator)
        if shape.critic == "separate":
            self.critic = nn.Sequential(_layers(shape, generator), self.critic)

    def forward(self, observations: Tensor) -> Tensor:
        """Return logits [M, A], or means and log stds [M, 2 D], for observations [M, O], or [M, O + A] with masks.

        The logit of an action that is not allowed is -inf. So what draws, scores or takes the most probable action
        has the same policy: the softmax over the actions that are allowed.
        """
        parameters = self.head(self.body(self._inputs(observations)))
        if not self.shape.action_masks:
            return parameters
        masks = observations[..., self.shape.observation_size :]
        return parameters.masked_fill(masks == 0, -math.inf)

    def _inputs(self, observations: Tensor) -> Tensor:
        """Return the scaled observations [M, O], without the masks that may follow them."""
        return self.scale(observations[..., : self.shape.observation_size])

    def values(self, observations: Tensor) -> Tensor:
        """Return the critic's value [M] of observations [M, O]; masks of actions may follow them."""
        inputs = self._inputs(observations)
        if self.shape.critic == "shared":
            inputs = self.body(inputs)
        return self.critic(inputs).squeeze(-1)

    def act(self, observations: Tensor, noise: Tensor | None) -> Tensor:
        """Draw actions: indices [M] or vectors [M, D].

        Args:
            observations: [M, O], or [M, O + A] with masks.
            noise: random numbers from `noise`, [M, A] or [M, D]; None for the most probable actions.
        """
        parameters = self(observations)
        if self.shape.head == "softmax":
            # The argmax of logits plus Gumbel noise is a draw.
            return (parameters if noise is None else parameters + noise).argmax(-1)
        mean, log_std = _mean_and_log_std(parameters)
        return mean if noise is None else mean + log_std.exp() * noise

    def noise(self, *count: int, generator: torch.Generator) -> Tensor:
        """Draw the random numbers that `act` needs, [*count, A] (Gumbel) or [*count, D] (standard normal)."""
        size = (*count, self.shape.action_size)
        if self.shape.head == "softmax":
            return torch.empty(size).exponential_(generator=generator).log_().neg_()
        return torch.randn(size, generator=generator)

    def score(
        self, observations: Tensor, actions: Tensor, *, entropy_gradient: bool = True
    ) -> Scored:
        """Return the log-probabilities of actions [M] or [M, D], with gradient, and entropies.

        Args:
            observations: [M, O], or [M, O + A] with masks.
            actions: indices [M] or vectors [M, D].
            entropy_gradient: whether the entropies of a softmax need a gradient, which takes longer.
        """
        parameters = self(observations)
        if self.shape.head == "softmax":
            log_pi = parameters.log_softmax(-1)
            logprobs = log_pi.gather(-1, actions[:, None]).squeeze(-1)
            if not entropy_gradient:
                log_pi = log_pi.detach()
            probabilities = log_pi.exp()
            norms = score_norm_of(logprobs.detach(), probabilities.detach())
            return Scored(logprobs, entropy_of(log_pi, probabilities), norms)
        mean, log_std = _mean_and_log_std(parameters)
        z = (actions - mean) / log_std.exp()
        logprobs = (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        entropy = (log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        # Derivatives of the log density: z / std in the mean, z^2 - 1 in the log std.
        slopes = (z / log_std.exp()).square() + (z.square() - 1).square()
        return Scored(logprobs, entropy, slopes.sum(-1).detach())

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return all parameters except a separate critic's."""
        count = len(self.value_parameters())
        parameters = list(self.parameters())
        return parameters[: len(parameters) - count]  # those of the critic are the last

    def value_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of a separate critic."""
        return list(self.critic.parameters()) if self.shape.critic == "separate" else []

    def write(self, folder: Path) -> None:
        """Write the policy into an existing folder."""
        write_json(folder / "policy.json", {"shape": self.shape})
        save_file(self.state_dict(), folder / "policy.safetensors")

    def read(self, folder: str | Path) -> None:
        """Take exactly the weights, and the scale of observations, that were saved in a folder.

        Raises:
            Refused: the folder holds no policy, or one of another shape.
        """
        saved = read_policy(folder)
        # The initial weights do not matter, because the loaded ones replace them.
        if replace(saved.shape, initial_weights=self.shape.initial_weights) != self.shape:
            raise Refused(
                f"The policy in {folder} is a {saved.shape}, and not a {self.shape}. Give its settings, or leave "
                "load out."
            )
        self.load_state_dict(saved.state_dict())

    def check(self, folder: Path) -> None:
        """Write the policy into an empty folder and read it back, before the first step."""
        self.write(folder)
        self.read(folder)

    def tensors(self) -> Iterable[Tensor]:
        """Return all that `write` writes, which must be finite."""
        return self.state_dict().values()

    def fingerprint(self) -> str:
        """Return a hash of the weights and of all else that is saved."""
        return hashlib.sha256(save(self.state_dict())).hexdigest()


def _mean_and_log_std(parameters: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_std = parameters.chunk(2, dim=-1)
    return mean, log_std.clamp(*LOG_STD_RANGE)


def _layers(shape: Shape, generator: torch.Generator | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise([shape.observation_size, *shape.hidden]):
        layers.append(_linear(shape, before, after, math.sqrt(2), generator))
        layers.append(ACTIVATIONS[shape.activation]())
    return nn.Sequential(*layers)


def _linear(
    shape: Shape, before: int, after: int, gain: float, generator: torch.Generator | None
) -> nn.Linear:
    layer = nn.Linear(before, after)
    if shape.initial_weights == "uniform":
        bound = 1 / math.sqrt(before)
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
        return layer
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer


def read_policy(folder: str | Path) -> Policy:
    """Read the policy that was saved in a folder, a run directory or its `model/`.

    Raises:
        Refused: the folder holds no policy, or it is damaged.
    """
    model = Path(model_directory(folder))
    # JSON, shapes and weights each have errors of their own
    with refusing(f"No policy could be read from {model}", "Give the directory of a control run."):
        shape: dict[str, Any] = json.loads(read_file(model / "policy.json"))["shape"]
        policy = Policy(Shape(**shape | {"hidden": tuple(shape["hidden"])}))
        policy.load_state_dict(load_file(model / "policy.safetensors"))
    return policy
