"""Adds up the time that reward functions take in training steps, and names one that takes most of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

STEPS = 5
"""Steps before a function is called slow, because the first calls may load models or open connections."""
SECONDS, SHARE = 1.0, 0.5
"""A slow function takes more than this many seconds per step, and more than this share of the step."""


@dataclass
class RewardTime:
    """The time of the steps so far, and that of each reward function in them; evaluations are left out.

    Attributes:
        steps: number of steps.
        step_seconds: time of all steps.
        seconds: time of each function in all steps, by its name.
    """

    steps: int = 0
    step_seconds: float = 0.0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, timings: Mapping[str, float]) -> dict[str, str]:
        """Count one more step.

        Args:
            timings: seconds of the step under `step_seconds`, and of each function under
                `rewards/NAME/seconds`.

        Returns:
            By its name, a warning for each function that is slow in the mean of the steps so far.
        """
        self.steps += 1
        self.step_seconds += timings["step_seconds"]
        for key, seconds in timings.items():
            if key.startswith("rewards/"):
                self.seconds[key.removeprefix("rewards/").removesuffix("/seconds")] += seconds
        step = self.step_seconds / self.steps
        means = {name: total / self.steps for name, total in self.seconds.items()}
        return {
            name: f"The reward {name} took {mean:.1f} of {step:.1f} seconds per step in the mean of "
            f"{self.steps} steps, so training mostly waits for it. Score all completions of a call together, "
            "write it as an async function if it waits for a service, or keep results that it computes again."
            for name, mean in means.items()
            if self.steps >= STEPS and mean > max(SECONDS, SHARE * step)
        }
