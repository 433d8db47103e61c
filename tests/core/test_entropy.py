"""The entropy of a step, and when a policy has lost it."""

from __future__ import annotations

import math

import pytest

from tokenrl.core.entropy import entropy_collapse_message, entropy_collapsed, final_entropy


@pytest.mark.parametrize(
    "coefficient, entropy, flagged",
    [(0, 0.0999, True), (0, 0.1, False), (0, 0.0, True), (0.001, 0.0, False), (0, math.nan, False)],
)
def test_entropy_collapse(coefficient, entropy, flagged):
    assert entropy_collapsed(coefficient, entropy) is flagged
    assert f"{entropy:.3g} nats" in entropy_collapse_message(entropy)


def test_the_final_entropy_is_that_of_the_last_tenth() -> None:
    assert final_entropy([1.0] * 18 + [0.5, 0.1]) == pytest.approx(0.3)
    assert final_entropy([1.0, 0.2]) == 0.2
    assert math.isnan(final_entropy([]))
