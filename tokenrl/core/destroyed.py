"""Decides from the metrics of a run's steps whether its updates have destroyed the policy.

A policy is destroyed if its reward has fallen by more than noise explains and one of three signs shows that
it can hardly recover: most groups have equal rewards, the entropy has collapsed, or most completions are cut.
It has collapsed if its entropy is lost before half of the task is learnt. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

SURE, SURE_OF_BEST = 4.5, 6.0
"""Standard errors by which the reward must fall, from the evaluation before training or from the best steps.

A run looks hundreds of times, so 2 are often chance; and the best of many steps were lucky as well.
"""
LEAST_STEPS, LEAST_GROUPS = 3, 32
"""Fewest steps, and fewest groups of completions in them, whose mean reward is compared."""
EQUAL, CUT = 0.75, 0.5
"""From these shares of groups with equal rewards, and of completions that are cut, on there is a sign."""
FALL = 4.0
"""The entropy has collapsed if it is below its first value divided by this."""


class Stretch(NamedTuple):
    """Consecutive steps: the mean reward and its variance, and the means of what gives a sign."""

    first: int
    last: int
    reward: float
    variance: float
    equal: float
    entropy: float
    cut: float


class Destroyed(NamedTuple):
    """What happened to a destroyed or collapsed policy.

    Attributes:
        flag: `policy-destroyed` if the reward fell, else `entropy-collapsed`.
        step: the step at which it was noticed.
        before, after: mean rewards.
        when: of which steps `before` is, in words.
        since: the first of the steps that `after` is from.
        signs: what shows that the policy is lost, in words.
        norms: smallest and largest gradient norm of the updates until then.
    """

    flag: str
    step: int
    before: float
    after: float
    when: str
    since: int
    signs: tuple[str, ...]
    norms: tuple[float, float]

    def __str__(self) -> str:
        """Say what happened in one sentence."""
        before, (low, high) = f"{self.before:.3g} ({self.when})", self.norms
        happened, reward = "has collapsed", f"was {self.after:.3g}, after {before}"
        if self.flag == "policy-destroyed":
            happened, reward = "is destroyed", f"fell from {before} to {self.after:.3g}"
        return (
            f"The policy {happened}: in steps {self.since} to {self.step} the mean reward {reward}, and "
            f"{' and '.join(self.signs)}. Until then the gradient norm before clipping was "
            f"{f'{low:.3g}' if low >= high else f'{low:.3g} to {high:.3g}'}."
        )


class Watch:
    """Follows the rewards of a run; `found` is the first destruction, None until there is one.

    The latest steps are compared with the evaluation before training, and with the best earlier steps. Steps
    of few prompts are noisy, so more of them are taken together.
    """

    def __init__(self, evaluation: Mapping[str, float], groups: int, solved: float | None = None) -> None:
        """Start before the first step.

        Args:
            evaluation: metrics of the evaluation before training; without `reward` and `reward_stderr` only
                steps are compared.
            groups: groups of completions in a step, which are independent.
            solved: mean reward at which the task counts as solved; None if nobody knows.
        """
        least = max(LEAST_STEPS, math.ceil(LEAST_GROUPS / groups))
        self._sizes = (least, 2 * least, 4 * least)
        self._evaluation = evaluation.get("reward"), evaluation.get("reward_stderr")
        self._solved = solved
        self._best: dict[int, Stretch] = {}
        self._latest: list[Stretch] = []
        self._start: Stretch | None = None
        self._norms = (math.inf, 0.0)
        self.found: Destroyed | None = None

    def see(self, step: int, metrics: Mapping[str, float]) -> Destroyed | None:
        """Take in a step; return the destruction if it is noticed now for the first time.

        Args:
            step: number of the step.
            metrics: its metrics. Without `reward_stderr`, as in steps of one prompt, nothing is compared.
        """
        error = metrics.get("reward_stderr")
        if self.found or error is None:
            return None
        names = ("frac_reward_zero_std", "entropy", "completions/clipped_ratio")
        now = Stretch(step, step, metrics["reward"], error * error, *(metrics[name] for name in names))
        self._start = self._start or now
        if 0 < (norm := metrics["grad_norm"]) < math.inf:
            self._norms = min(self._norms[0], norm), max(self._norms[1], norm)
        self._latest = [*self._latest, now][-2 * self._sizes[-1] :]
        self.found = next(filter(None, map(self._compare, self._sizes)), None)
        return self.found

    def state_dict(self) -> dict[str, Any]:
        """Return all that the watch knows, as plain values; a watch of any run can continue from it."""
        found = self.found
        signs, norms = ([], []) if found is None else (list(found.signs), list(found.norms))
        return {
            "sizes": list(self._sizes),
            "evaluation": list(self._evaluation),
            "solved": self._solved,
            "best": {str(size): list(steps) for size, steps in self._best.items()},
            "latest": [list(step) for step in self._latest],
            "start": None if self._start is None else list(self._start),
            "norms": list(self._norms),
            "found": None if found is None else found._asdict() | {"signs": signs, "norms": norms},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned, whatever this watch was made for."""
        self._sizes, self._evaluation = tuple(state["sizes"]), tuple(state["evaluation"])
        self._solved, self._norms = state["solved"], (state["norms"][0], state["norms"][1])
        self._best = {int(size): Stretch(*steps) for size, steps in state["best"].items()}
        self._latest = [Stretch(*step) for step in state["latest"]]
        self._start = None if state["start"] is None else Stretch(*state["start"])
        self.found = None
        if found := state["found"]:
            low, high = found["norms"]
            self.found = Destroyed(**{**found, "signs": tuple(found["signs"]), "norms": (low, high)})

    def _compare(self, size: int) -> Destroyed | None:
        """Compare the latest steps with earlier ones, of which none may be among the latest."""
        steps, start = self._latest, self._start
        if start is None or start.last == steps[-1].last or len(steps) < size:
            return None
        now = _mean(steps[-size:])
        if len(steps) >= 2 * size:
            earlier = _mean(steps[-2 * size : -size])
            self._best[size] = max(self._best.get(size, earlier), earlier, key=lambda mean: mean.reward)
        signs = tuple(_signs(start, now))
        kind, norms = "entropy-collapsed", self._norms
        found = Destroyed(kind, now.last, start.reward, now.reward, "step 1", now.first, signs, norms)
        for when, before, bound in self._references(size, now, start):
            # A policy that has kept half of what it had learnt is not lost, however sure the fall is.
            if signs and before - now.reward > max(bound, (before - start.reward) / 2):
                return found._replace(flag="policy-destroyed", before=before, when=when)
        half = start.reward if self._solved is None else (start.reward + self._solved) / 2
        return found if now.entropy < start.entropy / FALL and now.reward <= half else None

    def _references(self, size: int, now: Stretch, start: Stretch) -> list[tuple[str, float, float]]:
        """Return what the reward may have fallen from: in words, the mean reward, and the bound of chance."""
        found = []
        reward, error = self._evaluation
        if reward is not None and error is not None:
            # Equal rewards show no noise, so that of the first step counts too.
            bound = SURE * math.sqrt(error**2 + max(now.variance, start.variance / size))
            # Held-out prompts may be easier than training prompts: the first step, of the same policy, tells.
            if start.reward - now.reward >= (reward - now.reward) / 2:
                found.append(("evaluation before training", reward, bound))
        if best := self._best.get(size):
            bound = SURE_OF_BEST * math.sqrt(best.variance + max(now.variance, best.variance))
            found.append((f"steps {best.first} to {best.last}", best.reward, bound))
        return found


def _mean(steps: list[Stretch]) -> Stretch:
    n = len(steps)
    reward, variance, *rest = (fmean(values) for values in list(zip(*steps, strict=True))[2:])
    return Stretch(steps[0].first, steps[-1].last, reward, variance / n, *rest)


def _signs(start: Stretch, now: Stretch) -> list[str]:
    """Return what shows that the policy of some steps is lost, in words."""
    found = []
    if now.equal >= EQUAL:
        found.append(f"{now.equal:.0%} of the groups had equal rewards")
    if now.entropy < start.entropy / FALL:
        found.append(f"the entropy was {now.entropy:.2g} nats, down from {start.entropy:.2g}")
    if now.cut >= max(CUT, start.cut + (1 - start.cut) / 4):
        found.append(f"{now.cut:.0%} of the completions were cut")
    return found
