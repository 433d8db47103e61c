"""Comparisons whose runs are written by hand, so that a test can choose every number in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrl.files import write_json
from tokenrl.lab.compare.arguments import CompareArguments, with_shared
from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.execution import _write_settings
from tokenrl.lab.compare.loop import judge_directory
from tokenrl.lab.compare.plan import Plan, start_plan
from tokenrl.lab.compare.problems import make_plan
from tokenrl.runs.metrics import append_rows
from tokenrl.settings import arguments

FINISHED = {"exit_reason": "finished", "steps": 50}
PLAIN = {"entropy": 0.4, "grad_clipped": 0.2, "skipped_steps": 0}
"""What each step of a run without any trouble tells of its training."""
WALK = {
    "env": "walk",
    "max_steps": 50,
    "num_envs": 8,
    "eval_every": 10,
    "quiet": True,
}
"""A comparison with evaluations at 80, 160, 240, 320 and 400 episodes."""


def noise(seed: int, size: float = 0.002) -> float:
    """A spread over six seeds, with mean 0; no two arms get the same if their sizes differ."""
    return size * (-1.0, 0.6, -0.2, 1.0, -0.6, 0.2)[seed % 6]


def write_run(
    folder: Path,
    rewards: Sequence[float],
    greedy: Sequence[float] | None = None,
    *,
    every: int = 10,
    summary: Mapping[str, Any] | None = FINISHED,
    config: Mapping[str, Any] | None = None,
    counts: Callable[[int], Mapping[str, Any]] = lambda step: {"episodes": 8},
    **metrics: Any,
) -> None:
    """Write a run as a session writes it, with an evaluation before training and at each tenth step.

    Args:
        folder: its directory.
        rewards: sampled reward of each evaluation; a run with fewer of them ended early.
        greedy: the same for greedy rewards.
        every: steps between evaluations.
        summary: summary.json; None for a run that was killed.
        config: config.json.
        counts: the counts of samples of a step.
        **metrics: metrics of each step.
    """
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {"kind": "control", "versions": {}, **(config or {})})
    pairs = list(zip(rewards, greedy or rewards, strict=True))
    for step in range(every * (len(rewards) - 1) + 1):
        row = {**PLAIN, **counts(step), **metrics} if step else {}
        if step % every == 0:
            row |= {
                "eval_reward": pairs[step // every][0],
                "eval_reward_greedy": pairs[step // every][1],
            }
        append_rows(folder, step, row)
    if summary is not None:
        write_json(folder / "summary.json", summary)


Runs = Callable[[int], Mapping[str, Any]]
"""By seed, the arguments of `write_run` for a run of an arm."""


def rising(end: float, size: float = 0.002, **options: Any) -> Runs:
    """Runs whose reward rises from 0 to an end that differs a little between seeds."""

    def of_seed(seed: int) -> dict[str, Any]:
        # else the differences of two arms would all be equal
        last = end + noise(seed, size * (1 + end))
        return {"rewards": [0.0, last / 2, *[last] * 4], **options}

    return of_seed


def write_missing(
    runs: Iterable[Any],
    root: Path,
    of_run: Callable[[Any], Mapping[str, Any]] = lambda run: rising(0.5)(run.seed),
    **_: Any,
) -> None:
    """Write the runs that a comparison has not yet, in place of `execute`, which makes them.

    Args:
        runs: the runs.
        root: the directory of the comparison.
        of_run: the arguments of `write_run`; none for a run that is never made.
    """
    for run in runs:
        values = of_run(run)
        if values and not (root / run.path).exists():
            _write_settings(run, root)
            write_run(root / run.path, **values)


def planned(settings: Mapping[str, Any]) -> Plan:
    """Write the plan that `tokenrl.compare` makes of its keywords, and make none of the runs."""
    args = arguments(CompareArguments, with_shared(settings))
    plan = make_plan(args, print)
    start_plan(plan, Path(args.output_dir)).release()
    return plan


def compared(output_dir: Path, arms: Mapping[str, Runs], **options: Any) -> Comparison:
    """Write the runs of a comparison that `tokenrl.compare` plans, and judge them.

    Args:
        output_dir: the directory.
        arms: by arm, what its runs are like; the first is the reference.
        **options: further keywords of `tokenrl.compare`.
    """
    settings = {**WALK, "arms": tuple(arms), "output_dir": str(output_dir), **options}
    plan = planned(settings)
    write_missing(plan.runs({}), output_dir, lambda run: arms[run.arm](run.seed))
    return judge_directory(output_dir)


def caveats_of(comparison: Comparison, opening: str) -> list[str]:
    """The caveats that begin with a word."""
    return [text for text in comparison.words.caveats if text.startswith(opening)]
