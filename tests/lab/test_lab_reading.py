"""The reading of a measurement says what its numbers show, and no more."""

from __future__ import annotations

from tokenrl.lab.measure.measurement import Measured
from tokenrl.lab.measure.paired import GroupSize, Measurement
from tokenrl.lab.measure.reading import degrees, print_tables, reading
from tokenrl.lab.measure.unit_statistics import Estimate, reciprocal

KNOWN = Estimate(0.5, 0.25, 1.0)
UNKNOWN = Estimate(0.5, None, None)
SETTINGS = {
    "num_prompts": 16,
    "num_generations": 8,
    "reward": 0.25,
    "frac_reward_zero_std": 0.5,
    "probes": 200,
}


def row(name: str, *, declared: str = "exact", noise=KNOWN, cosine=UNKNOWN, quieter=UNKNOWN) -> Measurement:
    return Measurement(name, declared, False, 16, KNOWN, KNOWN, KNOWN, noise, cosine, KNOWN, quieter)


def measured(*rows: Measurement, sizes: tuple[GroupSize, ...] = ()) -> Measured:
    return Measured("here", "points", SETTINGS, rows, sizes, {})


def test_each_claim_carries_its_interval(capsys) -> None:
    found = measured(
        row("reinforce", noise=Estimate(4.0, 3.0, 5.0), quieter=Estimate(1.0, 1.0, 1.0)),
        row("rloo", cosine=Estimate(1.0, 1.0, 1.0), quieter=Estimate(3.1, 2.0, 4.0)),
        row("grpo", declared="biased", cosine=Estimate(0.9781, 0.9, 0.99), quieter=Estimate(0.5, 0.25, 0.8)),
        row("dapo", declared="biased", cosine=Estimate(0.99, 0.94, 1.02), quieter=Estimate(1.1, 0.9, 1.2)),
        sizes=(GroupSize("rloo", 2, KNOWN, None), GroupSize("rloo", 4, KNOWN, Estimate(1.5, 1.2, 2.0))),
    )
    text = reading(found)
    for claim in (
        "The least noise was found for rloo: that of one step is 0.5 (0.25 to 1) times",
        "rloo has 3.1 (2 to 4) times less noise",
        "grpo has 2 (1.25 to 4) times more noise",
        "No difference from no baseline is seen for: dapo.",
        "Grpo points 12 degrees (8 to 26) away from the gradient.",
        "No angle is seen for dapo, with intervals that reach to 20 degrees.",
        "divides the noise of rloo by 1.5 (1.2 to 2) from 2 to 4.",
        "which alone leave an error of 10% in a squared length",
        "50% of the groups have equal rewards",
    ):
        assert claim in text, (claim, text)
    print_tables(found)
    printed = capsys.readouterr().out
    assert "0.978 (0.9 to 0.99)" in printed and "not resolved" in printed


def test_nothing_is_claimed_of_what_is_not_resolved() -> None:
    noise = reciprocal(Estimate(0.5, -0.5, 1.0))
    text = reading(measured(row("rloo", noise=noise), row("grpo", declared="biased", noise=noise)))
    assert "not resolved" in text
    for word in ("times less", "times more", "degrees", "divides"):
        assert word not in text
    assert degrees(Estimate(1.01, 0.5, 1.02)) == "0 degrees (0 to 60)"
