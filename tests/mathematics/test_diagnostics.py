"""Signal and noise of the gradient from two halves, proven by enumeration; generators differ by seed."""

from __future__ import annotations

import itertools
import math
from statistics import fmean

import pytest
import torch

from tokenrl.core.statistics import GradientDiagnostics, generator_of, signal_and_noise


@pytest.mark.parametrize("groups", [(1, 1), (1, 2), (2, 3)])
def test_signal_and_noise_are_unbiased_also_where_the_halves_are_unequal(groups) -> None:
    """Each group draws one of two gradients; all combinations are enumerated."""
    draws = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    mean, count = draws.mean(0), sum(groups)
    estimates = [
        signal_and_noise(sum(drawn[: groups[0]]) / count, sum(drawn) / count, groups)
        for drawn in itertools.product(draws, repeat=count)
    ]
    signal, noise = map(fmean, zip(*estimates, strict=True))
    assert signal == pytest.approx(float(mean @ mean))
    assert noise == pytest.approx(float((draws - mean).square().sum(1).mean()) / count)


def test_ratio_and_scale_are_those_of_signal_and_noise() -> None:
    half, whole, groups = torch.tensor([1.0, 1.0]), torch.tensor([2.5, 1.5]), (2, 3)
    signal, noise = signal_and_noise(half, whole, groups)
    metrics = GradientDiagnostics(1).metrics(half, whole, groups)
    expected = {"gradient/snr": signal / noise, "gradient/noise_scale": 5 * noise / signal}
    assert signal > 0 and metrics == pytest.approx(expected)


@pytest.mark.parametrize("groups", [(0, 0), (0, 1)])
def test_without_two_halves_there_is_neither(groups) -> None:
    metrics = GradientDiagnostics(1).metrics(torch.zeros(3), torch.ones(3), groups)
    assert len(metrics) == 2 and all(map(math.isnan, metrics.values()))


def test_generators_differ_by_seed_purpose_and_number_and_repeat() -> None:
    def draw(*key) -> int:
        return int(torch.randint(2**62, (), generator=generator_of(*key)))

    keys = list(itertools.product((0, 1, 2**31, 2**32 - 1), ("probe", "minibatches"), range(50)))
    assert len({draw(*key) for key in keys}) == len(keys)
    assert draw(3, "probe", 7) == draw(3, "probe", 7)
