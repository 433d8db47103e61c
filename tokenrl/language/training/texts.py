"""Checks the texts of a run before its first update: prompts and demonstrations that the model cannot use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from tokenrl.errors import ALIKE, Refused, with_places
from tokenrl.language.policy.characters import MANY, texts_in, unknown_characters
from tokenrl.language.rollout.sampling import encode
from tokenrl.language.supervised.defaults import demonstrations
from tokenrl.language.supervised.fit import encode_demonstrations
from tokenrl.language.training.run import TrainingRun
from tokenrl.runs.findings import Finding, Weight

Rows = Sequence[Mapping[str, Any]]

MOST_UNKNOWN = 0.03
"""Largest share of characters that a tokenizer may lose without a problem."""


def check_characters(run: TrainingRun, findings: list[Finding]) -> str:
    """Count the characters that the tokenizer loses; add a finding if there are some, and say how many."""
    task = run.task
    parts = task.train_prompts, task.eval_prompts, getattr(task, "demonstrations", None) or ()
    rows = [row for part in parts for row in islice(part, MANY)]
    columns = ("prompt", *ALIKE[0])
    texts = [text for row in rows for name in columns for text in texts_in(row.get(name))]
    tokenizer = run.learner.policy.tokenizer
    words, share = unknown_characters(tokenizer, texts, "prompts, answers and demonstrations")
    if share:
        text = f"The tokenizer loses {words}. Take a model that can read and write them, or other spellings."
        weight: Weight = "void" if share > MOST_UNKNOWN else "watch"
        findings.append(Finding("unknown-characters", weight, text))
    return f"to the tokenizer {words}"


def usable_rows(run: TrainingRun, rows: Rows, which: str, findings: list[Finding]) -> Rows:
    """Return the rows whose prompts the policy can complete, and add a finding about those that it cannot."""
    if run.rewards.environments is not None:  # what is asked is known once an episode has begun
        return rows
    usable = list[Mapping[str, Any]]()
    refused = list[str]()
    for location, row in with_places(rows):
        try:
            encode(run.learner.policy, [row], run.learner.sampling, [location])
            usable.append(row)
        except Refused as error:
            refused.append(f"The first is that of {location}. {error}")
    if refused:
        text = f"{len(refused):,} of {len(rows):,} {which} cannot be asked. {refused[0]}"
        findings.append(Finding("prompts-refused", "void", text))
    return usable


def check_demonstrations(run: TrainingRun, findings: list[Finding]) -> None:
    """Add a finding about demonstrations that are longer than completions may be."""
    policy = run.learner.policy
    limit = run.args.max_completion_length
    try:
        rows = demonstrations(run.task)[:MANY]
        pairs = encode_demonstrations(policy, rows, run.rewards.environments)
    except Refused:  # there are none, or they are not used and do not fit
        return
    lengths = [len(completion) for _, completion in pairs]
    long = sum(length > limit for length in lengths)
    if long:
        text = (
            f"{long} of the first {len(lengths)} demonstrations have more than {limit} tokens; the longest "
            f"has {max(lengths)}. Such an answer is cut: give --max-completion-length {max(lengths)} or more."
        )
        weight: Weight = "void" if 2 * long > len(lengths) else "watch"
        findings.append(Finding("answers-too-long", weight, text))
