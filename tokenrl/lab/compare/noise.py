"""Measures noise and bias of the gradients of all arms at the same checkpoints, on the same completions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

from tokenrl.core.estimator import Estimator
from tokenrl.errors import TokenrlError
from tokenrl.lab.compare.records import Arm, Problem
from tokenrl.lab.compare.statistics.found import Interval
from tokenrl.lab.measure.arguments import MeasureArguments
from tokenrl.lab.measure.measurement import project_all, rows_at_once
from tokenrl.lab.measure.paired import compare
from tokenrl.lab.measure.projections import AT_ONCE, Projections, chosen_parameters
from tokenrl.lab.measure.rollouts import Samples, collect
from tokenrl.lab.measure.unit_statistics import Estimate
from tokenrl.language.policy.arguments import LoraArguments, ModelArguments
from tokenrl.language.policy.model import Policy
from tokenrl.language.policy.saving import SavedPolicy
from tokenrl.language.rollout.sampling import Sampling
from tokenrl.language.rollout.ways import choose_way
from tokenrl.language.tasks.task import Task, find_task
from tokenrl.language.training.arguments import SamplingArguments, TrainArguments
from tokenrl.language.training.defaults import length_of
from tokenrl.language.training.setup import make_policy
from tokenrl.runs.outcome import model_directory
from tokenrl.runs.threads import using_threads
from tokenrl.settings import arguments

WORK = 6e11
"""The most parameters x tokens x random directions of a measurement: about 20 seconds on one thread. It is
counted and not timed, so that the same comparison finds the same numbers again."""
PROMPTS, STEPS = 128, 8
"""Prompts that are measured, or if that is more those of so many steps, as long as it fits."""
LEAST_STEPS = 4
NOTHING = Interval(math.nan, math.nan, math.nan)
"""In place of a number that could not be measured."""
PROBES, LEAST_PROBES = 128, 32
"""Random directions on which gradients are projected."""
SAMPLED = (
    *("max_completion_length", "prompts_per_step"),
    *(f.name for kind in (SamplingArguments, ModelArguments, LoraArguments) for f in fields(kind)),
)
"""Settings that decide which completions a step has, and in which weights its gradient is."""


@dataclass(frozen=True)
class GradientNoise:
    """Noise and bias of the gradient of one arm at one checkpoint.

    Attributes:
        problem: label of the problem.
        checkpoint: label of the checkpoint, such as `half way`.
        arm: label of the arm.
        noise: trace of the covariance of the gradient of a step, divided by the squared length of its
            expectation. The steps of all arms have equally many samples: those of a step of the problem.
        cosine: cosine of the angle between the expected gradient and the unbiased one, which is that of RLOO.
            Estimates may exceed 1.
        note: why a number is missing, which is nan then, in words; else empty.
    """

    problem: str
    checkpoint: str
    arm: str
    noise: Interval
    cosine: Interval
    note: str = ""


def measure_noise(
    problem: Problem, arms: Sequence[Arm], checkpoints: Mapping[str, str | Path | None], *, seed: int = 0
) -> tuple[GradientNoise, ...]:
    """Measure the gradients of all arms at each checkpoint, on one set of completions.

    The completions are sampled as in the runs of the problem, from the task's first training prompts, as many
    of each prompt as the largest group of an arm has. The numbers of prompts and of random directions on
    which gradients are projected are such that a checkpoint takes at most about half a minute on a CPU.

    Args:
        problem: what the arms are compared on.
        arms: the arms.
        checkpoints: by label, directories of runs, of checkpoints or of models like the problem's; None for
            the model from which the runs start. See `checkpoints.checkpoints_of`.
        seed: seed of the completions, the random directions and the intervals.

    Returns:
        One result per checkpoint and arm. The note of an arm that cannot be measured says why, such as that
        it needs a critic. Control environments are not measured: for them the result is empty.

    Raises:
        Refused: the task or a model cannot be loaded.
    """
    if problem.kind == "control":
        return ()
    chosen = [_chosen(arm, problem) for arm in arms]
    found = []
    for label, place in checkpoints.items():
        with using_threads(1):  # so that sums are added in the same order everywhere
            seen = _seen(problem, [c for c in chosen if not c.note], place, seed)
            found += [_found(problem, label, c, seen, seed) for c in chosen]
    return tuple(found)


class _Chosen(NamedTuple):
    """An arm with its estimator and group size, and the reason why it cannot be measured, if there is one."""

    label: str
    estimator: Estimator
    group_size: int
    note: str


class _Seen(NamedTuple):
    """What all arms are measured on."""

    samples: Samples
    projections: Projections


def _chosen(arm: Arm, problem: Problem) -> _Chosen:
    usual, own = _arguments(problem), _arguments(problem, arm)
    other = [name for name in SAMPLED if getattr(own, name) != getattr(usual, name)]
    note = ""
    if own.estimator.needs_values:
        note = "it needs a critic, which is learnt only in runs of its own"
    elif other:
        note = f"it differs in {', '.join(other)}, so its completions or its weights are others"
    return _Chosen(arm.label, own.estimator, own.num_generations or problem.num_generations, note)


def _arguments(problem: Problem, arm: Arm | None = None) -> TrainArguments:
    """Return the arguments of the runs of an arm; without one, those of all arms with some estimator."""
    given = {name: value for name, value in problem.settings.items() if value is not None}
    any_ = {"estimator": "reinforce_running_mean"}  # fits groups of every size
    return arguments(TrainArguments, {**given, **(any_ if arm is None else arm.settings)})


def _seen(problem: Problem, chosen: Sequence[_Chosen], place: str | Path | None, seed: int) -> _Seen | str:
    """Sample at a checkpoint and project the scores for all arms, or return why that is not done."""
    if not chosen:
        return ""
    train = replace(_arguments(problem), gradient_checkpointing=False)  # it has no forward-mode derivative
    task, rewards = find_task(train)
    policy = _policy(train, task, place, reference=any(c.estimator.needs_reference for c in chosen))
    length = train.max_completion_length or length_of(task, train.model, policy)
    entropy = any(c.estimator.needs_entropy for c in chosen)
    size, per_step = max(2, *(c.group_size for c in chosen)), problem.prompts_per_step
    parameters = chosen_parameters(policy)
    # The slopes of entropies take as long again.
    work = WORK / ((1 + entropy) * sum(p.numel() for p in parameters.values()))
    rows = list(task.train_prompts)[: max(PROMPTS // per_step, STEPS) * per_step]
    lengths = [len(policy.encode(row["prompt"])) for row in rows]
    steps = len(rows) // per_step
    while steps > LEAST_STEPS and _tokens(lengths[: steps * per_step], size * length) > work / LEAST_PROBES:
        steps -= 1
    rows, lengths = rows[: steps * per_step], lengths[: steps * per_step]
    if steps < LEAST_STEPS:
        return f"that takes {LEAST_STEPS} steps of {per_step} training prompts, and the task has fewer"
    if _tokens(lengths, size * length) > work / LEAST_PROBES:
        return "that would take longer than half a minute; see `tokenrl lab measure`"
    args = MeasureArguments(num_generations=size, temperature=train.temperature, seed=seed)
    at_once = args.rows_at_once or rows_at_once(policy, length)
    sampling = Sampling(length, size, train.temperature, seed, truncate_prompts=train.truncate_prompts)
    samples = collect(policy, rewards, rows, sampling, rows_at_once=at_once)
    fit = int(work / (sum(lengths) + int(samples.mask.sum()))) // AT_ONCE * AT_ONCE
    args = replace(args, probes=max(LEAST_PROBES, min(PROBES, fit)))
    return _Seen(samples, project_all(policy, samples, parameters, args, entropy=entropy))


def _tokens(prompts: Sequence[int], of_completions: int) -> int:
    """Return the most tokens of prompts of given lengths and their completions, of so many tokens each."""
    return sum(prompts) + len(prompts) * of_completions


def _policy(args: TrainArguments, task: Task, place: str | Path | None, *, reference: bool) -> Policy:
    """Make the policy as a run does, with the reference of a KL, and give it the weights of a checkpoint."""
    from accelerate import Accelerator

    policy = make_policy(args, task, lambda line: None)
    if reference:
        policy.add_reference()
    if place is not None:
        folder = Path(model_directory(place))
        alone = folder / "adapter"  # beside the weights into which it is merged
        SavedPolicy(policy).read(alone if policy.has_adapter and alone.is_dir() else folder)
    device = Accelerator(cpu=args.cpu).device
    for model in (policy.model, policy.reference):
        if model is not None:
            model.to(device)
    choose_way(policy)
    return policy


def _found(problem: Problem, label: str, arm: _Chosen, seen: _Seen | str, seed: int) -> GradientNoise:
    """Measure one arm."""

    def without(reason: object) -> GradientNoise:
        return GradientNoise(problem.label, label, arm.label, NOTHING, NOTHING, f"not measured: {reason}")

    if arm.note or isinstance(seen, str):
        return without(arm.note or seen)
    size = seen.samples.group_size
    if size % arm.group_size:
        return without(f"{size} completions per prompt cannot be divided into groups of {arm.group_size}")
    options = {"prompts_per_step": problem.prompts_per_step, "group_size": arm.group_size, "seed": seed}
    try:
        (found,) = compare(*seen, {arm.label: arm.estimator}, **options)  # type: ignore[arg-type]
    except TokenrlError as error:
        return without(error)
    # Groups of the rows may be larger than those of the problem; ReMax adds a greedy completion to each.
    factor = size / problem.num_generations * (1 + arm.estimator.needs_greedy / arm.group_size)
    noise = _interval(found.noise, factor)
    note = "" if found.noise.resolved else "not resolved: the gradient is too small to be told from its noise"
    if note and found.noise.low is not None:
        note += f", which is more than {found.noise.low * factor:.3g}"
    return GradientNoise(problem.label, label, arm.label, noise, _interval(found.cosine), note)


def _interval(estimate: Estimate, factor: float = 1.0) -> Interval:
    """Return an estimate times a factor; nan where it is not resolved."""
    numbers = (estimate.value, estimate.low, estimate.high)
    return Interval(*(factor * x if estimate.resolved and x is not None else math.nan for x in numbers))
