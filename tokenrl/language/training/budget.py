"""Says how long a run is: a number of steps, or a number of completions that it may generate in all.

Estimators need different numbers of completions for a step: ReMax one greedy completion more per prompt, and
DAPO new groups in place of those whose rewards are all equal. A comparison gives all of them the same number
of completions, called samples here. Then the schedule of the learning rate and the evaluations follow the
samples too, in these units:

- a plain step is as many samples as a step has without greedy completions and refills, so that runs of all
  estimators are evaluated after (nearly) the same numbers of samples;
- the least step is as many as each step of this estimator has, so that the schedule of a run without refills
  is that of the same number of steps, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenrl.language.training.arguments import TrainArguments


@dataclass(frozen=True)
class Budget:
    """The length of a run.

    Attributes:
        max_steps: training steps; it counts only without `max_samples`.
        max_samples: completions to generate; None if steps are counted.
        plain: completions of a plain step.
        least: completions of a step without refills.
    """

    max_steps: int
    max_samples: int | None
    plain: int
    least: int

    @classmethod
    def of(cls, args: TrainArguments) -> Budget:
        """Return the budget of a run, from settings in which no number is left open."""
        steps, prompts, generations = args.max_steps, args.prompts_per_step, args.num_generations
        assert steps is not None and prompts is not None and generations is not None
        plain = prompts * generations
        return cls(steps, args.max_samples, plain, plain + prompts * args.estimator.needs_greedy)

    @property
    def steps(self) -> int:
        """The most steps that the run can have."""
        return self.max_steps if self.max_samples is None else -(-self.max_samples // self.least)

    @property
    def plain_steps(self) -> int:
        """The length of the run in plain steps, in which the times of evaluations are counted."""
        return self.max_steps if self.max_samples is None else -(-self.max_samples // self.plain)

    def spent(self, samples: int) -> bool:
        """Whether a number of samples uses the budget up; without `max_samples` none does."""
        return self.max_samples is not None and samples >= self.max_samples

    def position(self, step: int, samples: int) -> float:
        """Return the place in the schedule of the learning rate after some steps with so many samples."""
        return step if self.max_samples is None else samples / self.least

    def passes(self, every: int, step: int, before: int, now: int) -> bool:
        """Whether a step passes a multiple of `every` plain steps.

        Args:
            every: the distance of two evaluations in plain steps; 0: no step passes one.
            step: number of the step, which alone counts without `max_samples`.
            before: samples before the step.
            now: samples after it.
        """
        if self.max_samples is None:
            return bool(every and step % every == 0)
        return bool(every and now // (every * self.plain) > before // (every * self.plain))
