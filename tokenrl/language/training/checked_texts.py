"""Checks the texts of a task as the policy's tokenizer writes them: prompts, BOS tokens, demonstrations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tokenrl.errors import Refused
from tokenrl.language.training.defaults import demonstrations
from tokenrl.language.training.run import Run
from tokenrl.language.training.supervised import encode_demonstrations
from tokenrl.runs.checkup import Finding

SHOWN = 512
"""Demonstrations, and prompts for their BOS, that are looked at; more take longer and show the same."""


class Texts(NamedTuple):
    """The prompts that can be asked, and what is wrong with the others.

    Attributes:
        train: rows to train on whose prompt and completion fit into the context.
        held_out: rows to evaluate on, likewise.
        findings: problems and remarks.
    """

    train: Sequence[Mapping[str, Any]]
    held_out: Sequence[Mapping[str, Any]]
    findings: list[Finding]


def check_texts(run: Run) -> Texts:
    """Look at every prompt, and at the demonstrations."""
    task, findings = run.task, []
    train, found = _usable(run, task.train_prompts, "training prompts")
    held_out, more = _usable(run, task.eval_prompts, "held-out prompts")
    findings += found + more
    findings += [finding for finding in (_doubled_bos(run, train), _long_answers(run)) if finding]
    return Texts(train, held_out, findings)


def _usable(
    run: Run, rows: Sequence[Mapping[str, Any]], which: str
) -> tuple[Sequence[Mapping[str, Any]], list[Finding]]:
    """Return the rows whose prompts can be asked, and a finding about those too long or refused."""
    args, policy = run.args, run.learner.policy
    room = math.inf if policy.context is None else policy.context - args.max_completion_length
    long, refused, longest = [], {}, 0  # numbers of rows, and why
    for number, row in enumerate(rows):
        try:
            length = len(policy.encode(row["prompt"]))
        except Refused as error:
            refused[number] = str(error)
            continue
        longest = max(longest, length)
        if length > room:
            long.append(number)
    lost = {*refused, *(() if args.truncate_prompts and room > 0 else long)}
    usable = [row for number, row in enumerate(rows) if number not in lost] if lost else rows
    findings = []
    if long:
        findings.append(_context_finding(run, f"{len(long):,} of {len(rows):,} {which}", longest))
    if refused:
        first = min(refused)
        found = f"{len(refused):,} of {len(rows):,} {which} cannot be asked, the first in row {first}."
        findings.append(Finding("prompts-refused", found, "Training would be refused.", refused[first]))
    return usable, findings


def _context_finding(run: Run, which: str, longest: int) -> Finding:
    args, context = run.args, run.learner.policy.context or 0
    length = args.max_completion_length
    found = (
        f"{which} do not fit: the longest has {longest:,} tokens, and with {length:,} for the completion "
        f"that is more than the model's context of {context:,}."
    )
    if length < context and args.truncate_prompts:
        why = (
            "They are cut on the left, as truncate_prompts asks, so the policy does not see their beginning."
        )
        return Finding("context-too-short", found, why, "Shorten them if that matters.", grave=False)
    mend = "Shorten the prompts or leave them out"
    if longest < context:
        mend += f", give --max-completion-length {context - longest} or less"
    mend += ", or cut them on the left with --truncate-prompts." if length < context else "."
    return Finding("context-too-short", found, "Training would be refused.", mend)


def _doubled_bos(run: Run, rows: Sequence[Mapping[str, Any]]) -> Finding | None:
    """Return a finding if prompts begin with two BOS tokens."""
    policy = run.learner.policy
    bos, mark = policy.tokenizer.bos_token_id, policy.tokenizer.bos_token
    rows = [] if bos is None else rows[:SHOWN]
    doubled = [row for row in rows if policy.encode(row["prompt"])[:2] == [bos, bos]]
    if not doubled:
        return None
    found = f"{len(doubled):,} of {len(rows):,} training prompts begin with two BOS tokens ({mark})."
    why = "Models have not seen that in their training and answer worse."
    if not isinstance(doubled[0]["prompt"], str):
        mend = f"The chat template writes one itself: take {mark} out of the messages or out of the template."
    elif doubled[0]["prompt"].startswith(mark):
        mend = f"The tokenizer adds one itself: take {mark} away from the beginning of the prompts"
        again = ", or give the messages themselves instead of text that a chat template has already written"
        mend += f"{again if policy.tokenizer.chat_template else ''}."
    else:
        mend = f"With --chat the text becomes a message: take {mark} out of the prompts or the chat template."
    return Finding("doubled-bos", found, why, mend)


def _long_answers(run: Run) -> Finding | None:
    """Return a finding if completions of the given length cannot hold the demonstrations."""
    limit = run.args.max_completion_length
    try:
        pairs = encode_demonstrations(run.learner.policy, demonstrations(run.task)[:SHOWN])
    except Refused:  # there are none, or they are not used and do not fit
        return None
    lengths = [len(completion) for _, completion in pairs]
    long = sum(length > limit for length in lengths)
    if not long:
        return None
    found = (
        f"{long} of the first {len(lengths)} demonstrations have more than {limit} tokens; the longest has "
    )
    found += f"{max(lengths)}."
    why = f"The policy may write at most {limit}, so it cannot write such an answer to its end."
    mend = f"Give --max-completion-length {max(lengths)} or more."
    return Finding("answers-too-long", found, why, mend, grave=2 * long > len(lengths))
