"""What the contrast recipe makes of the numbers that a run leaves behind."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest
import torch

from tokenrl.core.statistics import GradientDiagnostics

RECIPE = runpy.run_path(str(Path(__file__).parents[2] / "recipes" / "control_contrast.py"))
Point, Side = RECIPE["Point"], RECIPE["Side"]


def test_noise_comes_back_out_of_ratio_and_norm() -> None:
    """Halves h1 and h2 of a gradient g = (h1 + h2) / 2: |h1 - h2|^2 / 4 is the noise, wherever they point."""
    for seed in range(5):
        first, second = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
        whole = (first + second) / 2
        ratio = GradientDiagnostics(1).metrics(first / 2, whole, 8)["gradient/snr"]
        update = {"gradient/snr": ratio, "grad_norm": float(whole.norm())}
        assert RECIPE["noise_of"](update) == pytest.approx(float((first - second).square().sum()) / 4)
    assert RECIPE["noise_of"]({"gradient/snr": None, "grad_norm": 0.0}) == 0


def test_noise_is_compared_at_equal_rewards() -> None:
    """Noise 3 R with a baseline and 12 R without: 4 times, though the variants earn differently often."""

    def run(rewards: list[float], factor: float) -> list[dict[str, float]]:
        return [{"reward": r, "gradient/snr": 1.0, "grad_norm": (2 * factor * r) ** 0.5} for r in rewards]

    updates = {"with": [run([1, 5, 5, 9], 3)], "without": [run([1, 1, 1, 5], 12), run([5, 8, 9, 10], 12)]}
    found = RECIPE["curves"](Side("a world", "row", 1, {}, updates, {}), 3)
    assert [point.reward for point in found["with"].values()] == [1, 5, 9]
    assert [point.noise for point in found["with"].values()] == pytest.approx([3, 15, 27])
    assert [*found["without"]] == [0, 1, 2]
    assert RECIPE["times"](found) == pytest.approx(4)


def test_bins_without_a_partner_or_without_noise_are_left_out() -> None:
    def curve(**noises: float) -> dict[int, object]:
        return {int(b[1:]): Point(0.0, noise, 0.0, 0.0) for b, noise in noises.items()}

    times = RECIPE["times"]
    assert times({"with": curve(b0=1, b1=2, b3=0), "without": curve(b1=6, b2=5, b3=4)}) == 3
    assert math.isnan(times({"with": curve(b0=1), "without": curve(b1=6)}))
