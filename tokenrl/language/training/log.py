"""Reads completions that somebody else sampled, refuses what cannot be done with them, and says what they mean.

The rows may be data of any kind, or the tables of completions of another run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tokenrl.errors import Refused, suggest
from tokenrl.language.tasks.memory import memory_splits
from tokenrl.language.tasks.rows import Rows
from tokenrl.language.tasks.sources import (
    IN_MEMORY,
    DataArguments,
    LeftOut,
    read_splits,
    with_prompts,
)
from tokenrl.language.tasks.task import PromptTask, is_unrewarded
from tokenrl.language.training.arguments import TrainArguments
from tokenrl.runs.checkpoint import tables
from tokenrl.runs.metrics import read_completions
from tokenrl.settings import shown

COLUMNS = ("completion", "completion_ids", "reward", "logprobs", "truncated")
"""The columns of a row that say what was sampled; the others are those of its prompt, which rewards get."""
OF_TABLES = ("replayed", "logged", "advantage", "teacher_prompt", "rewards/", "tokens/")
"""How the names of further columns begin that a run writes into its tables of completions."""


def read_log(choices: TrainArguments) -> Rows | None:
    """Read the rows that a run shall learn of, with a `prompt` each; None where none were given.

    Raises:
        Refused: they cannot be read, there are none, or they have no completions of a single turn.
    """
    source: Any = choices.rows
    if source is None:
        return None
    title = f"rows {shown(source, 80)}"
    files = []
    if isinstance(source, str):
        if source.startswith(IN_MEMORY):
            raise Refused(f"{title} was data given from Python: give it again.")
        files = tables(Path(source)) or tables(Path(source, "completions"))
    if files:
        rows = _of_tables(files, title)
    else:
        splits = read_splits(source) if isinstance(source, str) else memory_splits(source)
        if "train" not in splits:
            raise Refused(f"{title} has no split 'train'.{suggest('train', splits)}")
        rows = splits["train"]
    has_prompt = "prompt" in rows.columns or choices.prompt_template is None
    rows = with_prompts(
        rows, title, DataArguments() if has_prompt else choices, chat=bool(choices.chat)
    )
    if not rows.columns.keys() & {"completion", "completion_ids"}:
        raise Refused(
            f"{title} has no column 'completion', nor 'completion_ids'.{suggest('completion', rows.columns)}"
        )
    if choices.rows_sampler == "start":
        rows.columns.pop("logprobs", None)
    return rows


def _of_tables(files: Sequence[Path], title: str) -> Rows:
    """Return what a run has sampled for its steps, of its tables of completions; replayed and logged rows are not."""
    parts = [row for file in files for row in read_completions(file)]
    parts = [row for row in parts if not (row.get("replayed") or row.get("logged"))]
    rows = Rows.of(parts)
    if "ending" in rows.columns:
        raise Refused(f"{title} holds episodes, and logged rows have a single turn: take others.")
    columns = {
        name: values if name == "completion" else _as_written(values)
        for name, values in rows.columns.items()
        if not name.startswith(OF_TABLES)
    }
    return replace(rows, columns=columns)


def _as_written(values: list[Any]) -> list[Any]:
    """Return a column of a table of completions, in which lists and objects stand as JSON in all cells or none."""
    with suppress(TypeError, ValueError):
        cells = [None if value is None else json.loads(value) for value in values]
        if any(isinstance(cell, list | dict) for cell in cells):
            return cells
    return values


def is_task(choices: TrainArguments) -> bool:
    """Return whether the logged rows are the task too, as where none is named."""
    task, rows = choices.task, choices.rows
    is_named = isinstance(rows, str) and isinstance(task, str) and task == rows
    return rows is not None and (task is rows or isinstance(task, LeftOut) or is_named)


def with_prompts_of(choices: TrainArguments, rows: Rows) -> TrainArguments:
    """Return choices whose task is the distinct prompts of logged rows, each with the columns of its first row."""
    first = np.unique(rows.hashes, return_index=True)[1]
    task: Any = [*without_samples(rows).take(sorted(first.tolist()))]
    return replace(choices, task=task, prompt_column="prompt", prompt_template=None)


def without_samples(rows: Rows) -> Rows:
    """Return rows without what was sampled."""
    columns = {name: values for name, values in rows.columns.items() if name not in COLUMNS}
    return replace(rows, columns=columns)


def check_log(args: TrainArguments, task: PromptTask, rows: Rows) -> None:
    """Refuse what cannot be done with logged rows, whatever the model is."""
    estimator = args.estimator
    has_reward = "reward" in rows.columns
    clashes = {
        "an environment, as the rows have a single turn": task.environment,
        "allowed, as the rows need not obey it": args.allowed,
        "importance_centre, as no distribution of a sampler is kept": estimator.importance_centre,
        "zero_spread refill, which samples new groups": estimator.zero_spread == "refill",
        "prompt_weights, as nothing says how often the rows have each prompt": (
            args.prompt_weights != "uniform"
        ),
        "sync_every, as weights of two ages would sample": args.sync_every > 1,
        "replay, which repeats what the policy sampled": args.replay,
        "top_k, top_p or min_p, without which every token of the rows can be sampled": (
            not args.is_whole
        ),
        "reward none": is_unrewarded(args.reward),
        "baseline remax, as no greedy completion has a reward of the rows": (
            has_reward and "greedy_rewards" in estimator.needs
        ),
        "components separate, as the rows have one reward": (
            has_reward and estimator.components == "separate"
        ),
    }
    for clash, is_met in clashes.items():
        if is_met:
            raise Refused(f"rows were given together with {clash}: leave out one of the two.")
    is_recorded = args.rows_sampler == "start" or "logprobs" in rows.columns
    if "sampling_logprobs" in estimator.needs and not is_recorded:
        raise Refused(
            f"importance {estimator.importance!r} reads the log-probabilities of whoever sampled the rows, and these "
            "have no column logprobs: add it, or take importance none, or rows_sampler start (--rows-sampler start), "
            "with which the policy as it starts stands in; both are biased."
        )


def log_facts(args: TrainArguments, rows: Rows) -> dict[str, str]:
    """Return the lines of the header about logged rows: what they are, and what is ascended without weights."""
    distinct = len(np.unique(rows.hashes))
    facts = {"rows": f"{len(rows):,} of {distinct:,} prompts, from {shown(args.rows, 80)}"}
    if args.estimator.importance == "none":
        facts["ascends"] = (
            "the reward-weighted likelihood of the rows, less that of the baseline, and not the policy's expected "
            "reward: --estimator.importance sequence would divide by whoever sampled them"
        )
    return facts


def status_of(args: TrainArguments, rows: Rows) -> str:
    """Return what a run with logged rows declares of its bias."""
    if args.rows_sampler == "start":
        return "biased, as the policy of the start stands in for whoever sampled the rows"
    if "logprobs" not in rows.columns:
        return "biased, as nothing corrects that others than the policy sampled the rows"
    status: str = args.estimator.off_policy_status
    if status == "biased":
        return f"{status}, as importance {args.estimator.importance} leaves a part of the difference to the sampler"
    return f"{status} in the first pass over the rows; biased later, as they have moved the policy"
