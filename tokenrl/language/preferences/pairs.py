"""Reads preference data for a reward model: checks the rows, and splits them by prompt.

The format is TRL's: columns `prompt`, `chosen` and `rejected`, as text or as chat messages. The prompt may be
left out if both others hold whole texts or conversations that begin with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from tokenrl.errors import Refused, suggest, with_places
from tokenrl.files import canonical
from tokenrl.language.rewards.library import completion_texts
from tokenrl.language.tasks.held_out import (
    chosen,
    hold_out,
    read_parts,
)
from tokenrl.language.tasks.rows import Row, hashes, prompt_key
from tokenrl.language.tasks.sources import as_prompt, fault_of_prompt
from tokenrl.runs.rules import Finding, Weight
from tokenrl.runs.session import Session
from tokenrl.settings import check_number


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, a chosen and a rejected one.

    Attributes:
        prompt: text, or a list of chat messages.
        chosen: the better completion, text or chat messages like the prompt.
        rejected: the other completion.
        margin: by how much the reward of `chosen` should exceed the reward of `rejected`; None without that
            column.
        gold: gold rewards of `chosen` and `rejected`; None without those columns.
        tools: the tools that the chat template describes, as in the data; None without that column.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    margin: float | None = None
    gold: tuple[float, float] | None = None
    tools: Any = None

    @property
    def key(self) -> str:
        """The prompt as text. Pairs with equal keys must not be split between training and evaluation."""
        return prompt_key(self.prompt)


def load_pairs(
    data: Any,
    *,
    split: str = "train",
    eval_split: str | None = None,
    eval_size: int = 256,
    announce: Callable[[str], None] = lambda text: None,
) -> tuple[list[Pair], list[Pair], str]:
    """Load the training and the evaluation pairs of a source of preferences.

    Args:
        data: a JSON, CSV or Parquet file, a folder or a hub data set; or rows in memory; or a dict of splits.
        split: split to train on.
        eval_split: split to evaluate on; None for a validation or test split, or else pairs held out of
            `split`.
        eval_size: the most evaluation pairs.
        announce: prints a line for people, about pairs that are left out.

    Returns:
        The training pairs, the evaluation pairs, and in words how they were divided; empty for splits.

    Raises:
        Refused: the data does not exist, or a reward model cannot be trained on it.
    """
    name = f"data '{data}'" if isinstance(data, str) else "the preference data"
    read = partial(read_pairs, announce=announce)
    pairs, held_out, _ = read_parts(data, name, split, eval_split, read)
    if held_out is None:
        return divided(pairs, eval_size)
    return pairs, [held_out[i] for i in chosen(held_out, eval_size)], ""


def read_pairs(
    rows: Sequence[Row], source: str, announce: Callable[[str], None] = lambda text: None
) -> list[Pair]:
    """Check rows of preferences and return them as pairs; identical completions are left out.

    Args:
        rows: rows with `chosen` and `rejected`, and optionally `prompt`, `margin`, `chosen_gold` and
            `rejected_gold`. Without a prompt, the common beginning of chosen and rejected is the prompt.
        source: name of the data in error messages.
        announce: prints a line for people, with the number of pairs that are left out.

    Raises:
        Refused: there are no rows, a column is missing, a value is neither text nor messages, or all pairs
            are identical.
    """
    if not rows:
        raise Refused(f"{source} is empty: give at least two rows of prompt, chosen and rejected.")
    for column in ("chosen", "rejected"):
        if column not in rows[0]:
            raise Refused(
                f"{source} has no column '{column}'.{suggest(column, rows[0])} Preferences are rows of chosen, "
                "rejected and, unless these hold it, prompt."
            )
    pairs = [_pair(row, f"{source}, {location}") for location, row in with_places(rows)]
    different = [pair for pair in pairs if pair.chosen != pair.rejected]
    if not different:
        raise Refused(
            f"{source}: chosen and rejected are identical in every one of the {len(rows)} rows."
        )
    if same := len(pairs) - len(different):
        announce(
            f"{source}: {same:,} of {len(pairs):,} pairs are left out, whose completions are identical."
        )
    return different


def _pair(row: Row, source: str) -> Pair:
    prompt, chosen, rejected = (
        as_prompt(row.get(name)) for name in ("prompt", "chosen", "rejected")
    )
    fault = fault_of_prompt(chosen, "chosen") or fault_of_prompt(rejected, "rejected")
    if prompt is not None:
        fault = fault or fault_of_prompt(prompt)
    if fault:
        raise Refused(
            f"{source}: {fault}; it must be text, or a list of chat messages "
            '{"role": ..., "content": text}.'
        )
    is_text = isinstance(chosen, str)
    is_mixed = is_text != isinstance(rejected, str)
    if not is_text and not is_mixed and isinstance(prompt, str):
        # Some data sets repeat the first message as the prompt.
        is_mixed = not chosen[0]["content"] == rejected[0]["content"] == prompt
        prompt = None
    if is_mixed:
        raise Refused(
            f"{source}: some of prompt, chosen and rejected are text and others are chat messages. Give them "
            "alike; only a prompt of messages may stand before text."
        )
    if prompt is None:
        cut = _common(chosen, rejected)
        prompt = chosen[:cut]
        chosen = chosen[cut:]
        rejected = rejected[cut:]
    numbers = {}
    for name in ("margin", "chosen_gold", "rejected_gold"):
        if (value := row.get(name)) is not None:
            check_number(f"{source}: {name}", value)
            numbers[name] = float(value)
    margin = numbers.pop("margin", None)
    gold = (numbers["chosen_gold"], numbers["rejected_gold"]) if len(numbers) == 2 else None
    return Pair(prompt, chosen, rejected, margin, gold, row.get("tools"))


def _common(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Count the messages or characters that both begin with; text is cut at a space, not within a word."""
    cut = 0
    while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
        cut += 1
    if isinstance(chosen, str):
        return max(0, chosen.rfind(" ", 0, cut))
    return cut


def divided(pairs: list[Pair], size: int) -> tuple[list[Pair], list[Pair], str]:
    """Divide pairs into those to train on and those to evaluate on, as `held_out.hold_out` does.

    Args:
        pairs: the pairs.
        size: the most pairs to evaluate on.

    Returns:
        The pairs of either kind, and in words how they were divided.

    Raises:
        Refused: there are too few pairs to divide.
    """
    if len(pairs) < 2:
        raise Refused(
            "There is one pair: to train on some and evaluate on others, give at least 2 pairs."
        )
    texts = [canonical([pair.key, pair.chosen, pair.rejected]) for pair in pairs]
    prompts = hashes(pair.key for pair in pairs)
    train, held_out, words = hold_out(prompts, partial(map, texts.__getitem__), size)
    return [pairs[i] for i in train], [pairs[i] for i in held_out], words


MIN_LENGTH_SHARE = 0.95
"""From this share of pairs on in which the longer (or shorter) one is chosen, length explains the choices."""
MAX_REPEATED_SHARE = 0.5
"""From this share of held-out pairs on that are trained on too, the evaluation is worth nothing."""


def check_pairs(session: Session, train: Sequence[Pair], held_out: Sequence[Pair]) -> None:
    """Look for mistakes in the pairs, and print them.

    Args:
        session: the session of the run, which has been opened.
        train: the pairs to train on.
        held_out: the pairs to evaluate on.
    """

    trained = {repr((pair.prompt, pair.chosen, pair.rejected)) for pair in train}
    repeated = [repr((pair.prompt, pair.chosen, pair.rejected)) in trained for pair in held_out]
    swapped = [repr((pair.prompt, pair.rejected, pair.chosen)) in trained for pair in train]
    texts = [completion_texts([pair.chosen, pair.rejected]) for pair in train]
    gaps = np.array([len(chosen) - len(rejected) for chosen, rejected in texts])
    shares = {"longer": np.mean(gaps > 0), "shorter": np.mean(gaps < 0)}
    findings = [
        *_mistakes(
            "held-out-in-training",
            repeated,
            "held-out pairs are trained on too",
            MAX_REPEATED_SHARE,
        ),
        *_mistakes("contradictory-pairs", swapped, "training pairs are there in both orders", 1),
    ]
    for name, share in shares.items():
        if share >= MIN_LENGTH_SHARE:
            text = (
                f"In {share:.0%} of the training pairs the {name} completion is chosen: a reward model may "
                "learn that alone. Add pairs in which it is the other way."
            )
            findings.append(Finding("length-decides", "watch", text))
    measured = {
        "pairs": f"{len(train):,} to train on, {len(trained):,} of them distinct; {len(held_out):,} held out",
        "chosen": f"the longer in {shares['longer']:.0%}, the shorter in {shares['shorter']:.0%}",
    }
    session.conclude("data, model and loss", measured, findings)


def _mistakes(
    flag: str, marks: Sequence[bool], words: str, largest_share: float
) -> Iterator[Finding]:
    """Yield a finding if some pairs are marked, which is a problem from a share of them on."""
    if count := sum(marks):
        weight: Weight = "void" if count >= largest_share * len(marks) else "watch"
        yield Finding(flag, weight, f"{count:,} of {len(marks):,} {words}: take them out.")
