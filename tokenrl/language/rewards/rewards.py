"""Rewards completions with plain functions, several at once with weights.

A reward is a function `f(prompts, completions, **columns) -> list[float | None]`, sync or async, that is
called with keyword arguments only; None abstains from a row. This is the signature of TRL's rewards, and
reward models have it too. Each function gets copies of the rows and completions, so what it changes in place
reaches neither another function nor a later step. A reward with an attribute `binary = True` promises 1 for
right and 0 for wrong, which gives pass@k its meaning. One with an attribute `range = (low, high)` promises to
stay between the two, which says how large a difference of rewards is; a binary one has the range (0, 1) by
itself. The library's rewards say both themselves where they hold. A reward that breaks its promise stops the
run.

The state of a reward that is an object with `state_dict` and `load_state_dict` is saved with a run.

A reward lies between -1e12 and 1e12, and so does the weighted sum (`LARGEST_REWARD`): far larger numbers
would overflow float32, in which the loss is computed. Whatever a reward raises, `sys.exit` included,
stops the run with a message that names the function, its line and the prompts; only a Ctrl-C is not its
failure.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from tokenrl.errors import Refused, Stopped
from tokenrl.language.rewards.calls import (
    Failed,
    Late,
    TrainerState,
    accepted_arguments,
    call_rewards,
    keeper,
    restore_states,
    row_in_words,
    states_of,
)
from tokenrl.language.rewards.environments import Environments
from tokenrl.language.rewards.loading import (
    Range,
    declared_range,
    is_binary,
    load_reward,
)
from tokenrl.language.rewards.model import RewardModel
from tokenrl.language.rewards.worker import RewardProcess
from tokenrl.names import original
from tokenrl.settings import LARGEST_REWARD

# Arguments that every reward may ask for. Columns of these names are not passed on, as in TRL.
GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
WITHHELD = ("prompt", "completion", *GIVEN)
ROUNDING = 1e-6
"""How far a reward may leave its declared range, as a share of the range: sums of floats are rounded."""


class RewardResult(NamedTuple):
    """Rewards of N completions by F functions.

    Attributes:
        values: float64 [N, F], the reward of each function before its weight; nan where it abstained.
        total: float64 [N], the sum of weight times reward over the functions that did not abstain. Their
            weights are not renormalised. It is 0 (not nan) in rows that are not valid, so that its product
            with a token weight of 0 is 0.
        valid: bool [N], False where all functions of a weight other than 0 abstained, or one of them if such
            rows are left out.
        logged: the mean of the values that functions gave to `log_metric`, by name.
        extra: columns of N values that functions gave to `log_extra`.
    """

    values: np.ndarray
    total: np.ndarray
    valid: np.ndarray
    logged: dict[str, float]
    extra: dict[str, list[Any]]


class Rewards:
    """Several reward functions with weights, which are called together and whose results are checked.

    Attributes:
        functions: the F functions.
        names: their distinct names, as metrics and messages use them.
        weights: float64 [F].
        binary: whether the total is 0 or 1 by declaration: a single function declared binary, of weight 1.
        pass_threshold: the least total with which a completion is right, for pass@k. None: nothing says so.
        environments: what the policy plays episodes in; None for completions of one turn.
        environment_weight: the weight of the environments' own rewards; 0 if they give none.
        seconds: the time that each function has taken in all calls so far, by its name.
        keepers: the objects that have a state to be saved, by the names of their functions.
        faults: in words, the first error or missed deadline of each function that abstained because of it.
        late: the number of completions so far whose reward missed the deadline.
        state: how far the run is, which every call passes on as `trainer_state`; the run sets it.
    """

    def __init__(
        self,
        functions: Any,
        weights: Sequence[float] | None = None,
        *,
        timeout: float | None = None,
        abstains: bool = False,
        abstains_on_error: bool = False,
        leaves_out: bool = False,
        sources: Sequence[Any] | None = None,
        pass_threshold: float | None = None,
        environments: Environments | None = None,
        optional: bool = False,
        unrewarded: bool = False,
    ) -> None:
        """Take the functions; nothing is called yet.

        Args:
            functions: one reward or a sequence of them: callables, or anything that `load_reward` takes.
            weights: one finite number per function; None means 1 for each.
            timeout: seconds that one call of a function may take. Each function then runs in a process of
                its own, which is killed at the deadline. A `RewardModel` stays in this process, where the
                accelerator is, and has no deadline. None: all functions run here, without a deadline.
            abstains: whether a completion whose call misses the deadline gets no reward; else the run stops.
            abstains_on_error: whether a completion for which a function raises an error gets no reward from it.
            leaves_out: whether a completion counts nowhere if a function with a weight abstained from it; else
                it does unless all of these abstained.
            sources: for each function, the spec from which that process loads it, as `load_reward` takes it;
                None sends the functions themselves, which must then be picklable.
            pass_threshold: the least total, after the weights, with which a completion is right. None: the
                weight of the function if there is only one and it is declared binary, else no threshold; the
                sum of several rewards does not say when an answer is right.
            environments: what the policy plays episodes in. Their own rewards are one more function, the last
                one, of weight 1 unless the weights have a number for it.
            optional: whether there may be no function, so that all rewards are 0.
            unrewarded: whether the environments' own rewards do not count either.

        Raises:
            Refused: there is no function, the weights are not finite or not one per function, a function
                declares a range that is none, or cannot be sent to another process.
        """
        several = isinstance(functions, Sequence) and not isinstance(functions, str)
        specs = list(functions) if several else [functions]
        self.environments = environments
        self.state = TrainerState()
        if environments is not None and environments.rewarded and not unrewarded:
            if weights is not None and len(weights) == len(specs):
                weights = [*weights, 1.0]
            specs.append(environments)
        self.functions = [load_reward(function) for function in specs]
        self.names = unique_names(self.functions)
        if not (self.functions or optional or unrewarded):
            problem = "No reward function was given"
            if environments is not None:
                problem += f", and {environments.__name__} has no get_reward"
            raise Refused(f"{problem}: give at least one.")
        weights = [1.0] * len(specs) if weights is None else list(weights)
        if len(weights) != len(specs) or not all(math.isfinite(weight) for weight in weights):
            names = ", ".join(self.names)
            raise Refused(
                f"reward_weights {weights} for {names}: give {len(specs)} finite number(s)."
            )
        self.weights = np.asarray(weights, dtype=np.float64)  # [F]
        is_last = bool(specs) and specs[-1] is environments
        self.environment_weight = weights[-1] if is_last else 0.0
        self._ranges = list(map(declared_range, self.functions, self.names))
        self.seconds = dict.fromkeys(self.names, 0.0)
        owners = zip(self.names, map(keeper, self.functions), strict=True)
        self.keepers = {name: owner for name, owner in owners if owner is not None}
        declared = len(specs) == 1 and is_binary(self.functions[0]) and weights[0] > 0
        self.binary = declared and weights[0] == 1 and pass_threshold in (None, 1.0)
        self.pass_threshold = weights[0] if declared and pass_threshold is None else pass_threshold
        counted = np.flatnonzero(self.weights)
        self._counted = counted if len(counted) else slice(None)  # no function has a weight
        self._leaves_out = leaves_out
        self.faults = dict[str, str]()
        self.late = 0
        self._callers: dict[str, Any] = dict(zip(self.names, self.functions, strict=True))
        self._excused: tuple[type[Stopped], ...] = (Failed,) if abstains_on_error else ()
        if timeout is not None:
            self._excused += (Late,) if abstains else ()
            self._move(sources or specs, timeout)

    def _move(self, sources: Sequence[Any], timeout: float) -> None:
        """Let each function be called in a process of its own, with a deadline in seconds.

        Reward models and the rewards of environments stay. The latter are the last and have no source.
        """
        for name, source in zip(self.names, sources, strict=False):
            function = self._callers[name]
            if isinstance(function, RewardModel | Environments):
                continue
            if self.environments and "environments" in inspect.signature(function).parameters:
                raise Refused(
                    f"Reward function {name} asks for the environments, which stay in this process: leave "
                    "reward_timeout out, which moves it to another."
                )
            if name in self.keepers:
                raise Refused(
                    f"Reward function {name} has a state_dict, and would be called in another process, which does "
                    "not save its state: leave reward_timeout out."
                )
            self._callers[name] = RewardProcess(name, source, function, timeout)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state of each function that has one, by its name."""
        return states_of(dict(zip(self.names, self.functions, strict=True)))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        restore_states(dict(zip(self.names, self.functions, strict=True)), state)

    @property
    def range(self) -> Range | None:
        """The least and the largest total of rows in which no function abstains; None without all ranges."""
        if None in self._ranges or not self._ranges:
            return None
        ranges = np.array(self._ranges, dtype=np.float64)  # [F, 2]
        low, high = np.sort(self.weights[:, None] * ranges, axis=1).sum(axis=0)
        return float(low), float(high)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check, before anything is sampled, that every function gets the arguments it asks for.

        Args:
            columns: names of the columns of the data.

        Raises:
            Refused: a function has a parameter without a default that is neither a column nor passed to every
                reward.
        """
        available = [*GIVEN, *(column for column in columns if column not in WITHHELD)]
        if self.environments is not None:
            available += ["environments", "environment_rewards"]
        for name, function in zip(self.names, self.functions, strict=True):
            accepted_arguments(function, f"Reward function {name}", dict.fromkeys(available))
            if hasattr(function, "check_columns"):  # an option of the reward names a column
                function.check_columns(available)

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Check, before anything is sampled, the values of rows that an environment or a reward asks for.

        Raises:
            Refused: one of them cannot be used; the message names the row.
        """
        functions: list[Any] = [self.environments, *self.functions]
        for function in functions:
            if hasattr(function, "check_rows"):
                function.check_rows(rows)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        *,
        all_may_abstain: bool = False,
        locations: Sequence[str] = (),
    ) -> RewardResult:
        """Reward N completions.

        Args:
            prompts: N prompts, text or chat messages.
            completions: N texts. Where the prompt is chat messages, the text is passed on as
                `[{"role": "assistant", "content": text}]`.
            completion_ids: N lists of token ids.
            columns: the other columns of the data, N values each.
            all_may_abstain: do not stop if no row has a reward; for a part of a step, and for evaluations.
            locations: where the prompt of each completion stands in the data, for messages; empty if unknown.

        Raises:
            Stopped: a function raised, it did not return a number within `LARGEST_REWARD` or None for each
                completion, it is declared binary and returned another number than 0 or 1, or one outside its
                declared range, a weighted sum is beyond `LARGEST_REWARD`, or all functions abstained from all
                rows. The message names the function, the completion and its prompt.
            Refused: a function asks for a column that does not exist.
        """
        if not self.functions:
            count = len(completions)
            nothing = np.zeros((count, 0))
            return RewardResult(nothing, np.zeros(count), np.ones(count, dtype=bool), {}, {})
        rows = {key: list(values) for key, values in columns.items() if key not in WITHHELD}
        rows["completion_ids"] = list(completion_ids)
        rows["prompts"] = []
        rows["completions"] = []
        for prompt, completion in zip(prompts, completions, strict=True):
            if not isinstance(prompt, str):
                prompt = [*map(dict, prompt)]
                if isinstance(completion, str):
                    completion = [{"role": "assistant", "content": completion}]
            rows["prompts"].append(prompt)
            rows["completions"].append(completion)
        # Environments are no data: they are not copied, and stay in this process.
        objects: dict[str, Any] = {}
        if self.environments is not None and "environments" in rows:
            objects["environments"] = rows.pop("environments")
        results = call_rewards(
            self._callers, rows, self.state, locations, objects, excused=self._excused
        )
        self.late += int(results.late.sum())
        self.faults = results.faults | self.faults
        for name, spent in results.seconds.items():
            self.seconds[name] += spent
        values = np.stack([results.values[name] for name in self.names], axis=1)
        values[results.late] = np.nan  # a part of the sum would be another reward
        described = partial(row_in_words, rows["prompts"], rows["completions"], locations)
        self._check_declared(values, described)
        counts = ~np.isnan(values[:, self._counted])
        valid = counts.all(axis=1) if self._leaves_out else counts.any(axis=1)  # [N]
        if not valid.any() and not all_may_abstain:
            problem = f"abstained from each of {len(valid)} completions"
            if completions:
                problem += f", such as {described(0)}"
            raise Stopped(f"Reward functions ({', '.join(self.names)}) {problem}.")
        for column, items in results.extra.items():
            if len(items) != len(valid):
                counts = f"{len(items)} values for {len(valid)} completions"
                raise Stopped(f"log_extra('{column}') got {counts}; give one for each.")
        means = {name: float(np.mean(numbers)) for name, numbers in results.logged.items()}
        if Late in self._excused:
            means["frac_rows_late"] = float(results.late.mean())
        total = np.where(valid, self._total(values, described), 0.0)
        return RewardResult(values, total, valid, means, results.extra)

    def seconds_since(self, earlier: Mapping[str, float]) -> dict[str, float]:
        """Return the seconds of each function since `seconds` was `earlier`, by its name in timings.jsonl."""
        spent = {name: now - earlier[name] for name, now in self.seconds.items()}
        return {f"rewards/{name}/seconds": seconds for name, seconds in spent.items()}

    def _total(self, values: np.ndarray, described: Callable[[int], str]) -> np.ndarray:
        """Return the weighted sums [N] of the rewards [N, F]; stop at one that is too large."""
        with np.errstate(over="ignore", invalid="ignore"):
            total: np.ndarray = np.nansum(values * self.weights, axis=1)
        large = ~(np.abs(total) <= LARGEST_REWARD)  # not `>`, which is False for nan
        if large.any():
            row = int(large.argmax())
            raise Stopped(
                f"The weighted sum of the rewards of {described(row)} is {total[row]:g}, beyond "
                f"{LARGEST_REWARD:g}: give smaller reward_weights."
            )
        return total

    def _check_declared(self, values: np.ndarray, described: Callable[[int], str]) -> None:
        """Stop if a function returned a number that it has declared not to return."""
        functions = zip(self.names, self.functions, self._ranges, values.T, strict=True)
        for name, function, bounds, column in functions:
            if bounds is None:
                continue
            if is_binary(function):
                promise = "be binary"
                wrong = ~(np.isin(column, (0.0, 1.0)) | np.isnan(column))
            else:
                low, high = bounds
                promise = f"lie in the range {low:g} to {high:g}"
                slack = ROUNDING * (high - low)
                wrong = (column < low - slack) | (column > high + slack)  # False for nan
            if wrong.any():
                row = int(wrong.argmax())
                raise Stopped(
                    f"Reward function {name} is declared to {promise} and returned {column[row]:g} for "
                    f"{described(row)}: correct it, or what it declares."
                )


def unique_names(functions: Sequence[Any]) -> list[str]:
    """Return a distinct name for each function, for metrics; a repeated name gets a number."""
    names: list[str] = []
    for function in map(original, functions):
        whole = str(getattr(function, "__name__", type(function).__name__))
        name = unique = whole.replace("<lambda>", "reward")
        number = 1
        while unique in names:
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names
