"""Reads preference data for a reward model: checks the rows, and splits them by prompt.

The format is TRL's: columns `prompt`, `chosen` and `rejected`, as text or as chat messages. The prompt may be
left out if both others hold whole texts or conversations that begin with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenrl.errors import Refused, suggest, with_places
from tokenrl.language.rewards.library import completion_texts
from tokenrl.language.tasks.held_out import eval_split as find_eval_split, prompt_key
from tokenrl.language.tasks.sources import as_prompt, fault_of_prompt, memory_splits, read_splits
from tokenrl.runs.console import conclude
from tokenrl.runs.findings import Finding, Weight
from tokenrl.runs.session import Session
from tokenrl.settings import check_number

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt, of which one was chosen.

    Attributes:
        prompt: text, or a list of chat messages.
        chosen: the better completion, text or chat messages like the prompt.
        rejected: the other completion.
        margin: by how much the reward of `chosen` should exceed that of `rejected`; None without that column.
        gold: gold rewards of `chosen` and `rejected`; None without those columns.
    """

    prompt: Any
    chosen: Any
    rejected: Any
    margin: float | None = None
    gold: tuple[float, float] | None = None

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
    seed: int = 0,
) -> tuple[list[Pair], list[Pair]]:
    """Load the training and the evaluation pairs of a source of preferences.

    Args:
        data: a JSON, CSV or Parquet file, a folder or a hub data set; or rows in memory; or a dict of splits.
        split: split to train on.
        eval_split: split to evaluate on; None for a validation or test split, or else pairs held out of
            `split`.
        eval_size: number of evaluation pairs; if they are held out, at most a fifth of all.
        seed: seed of the choice of evaluation pairs.

    Returns:
        The training pairs and the evaluation pairs.

    Raises:
        Refused: the data does not exist, or a reward model cannot be trained on it.
    """
    named = isinstance(data, str | Path)
    name = f"data '{data}'" if named else "the preference data"
    splits = read_splits(str(data)) if named else memory_splits(data)
    held_out_split = find_eval_split(splits, name, split, eval_split)
    pairs = read_pairs(splits[split], f"{name}, split '{split}'")
    if held_out_split is None:
        return hold_out(pairs, eval_size, seed)
    held = read_pairs(splits[held_out_split], f"{name}, split '{held_out_split}'")
    order = np.random.default_rng([seed, 2]).permutation(len(held))[: max(1, eval_size)]
    return pairs, [held[i] for i in sorted(order)]


def read_pairs(rows: Sequence[Row], where: str) -> list[Pair]:
    """Check rows of preferences and return them as pairs; identical completions are left out.

    Args:
        rows: rows with `chosen` and `rejected`, and optionally `prompt`, `margin`, `chosen_gold` and
            `rejected_gold`. Without a prompt, the common beginning of chosen and rejected is the prompt.
        where: name of the data in error messages.

    Raises:
        Refused: there are no rows, a column is missing, a value is neither text nor messages, or all pairs
            are identical.
    """
    if not rows:
        raise Refused(f"{where} is empty: give at least two rows of prompt, chosen and rejected.")
    for column in ("chosen", "rejected"):
        if column not in rows[0]:
            problem = f"{where} has no column '{column}'.{suggest(column, rows[0])}"
            raise Refused(
                f"{problem} Preferences are rows of chosen, rejected and, unless these hold it, prompt."
            )
    pairs = [_pair(row, f"{where}, {location}") for location, row in with_places(rows)]
    different = [pair for pair in pairs if pair.chosen != pair.rejected]
    if not different:
        raise Refused(
            f"{where}: chosen and rejected are identical in every one of the {len(rows)} rows."
        )
    return different


def _pair(row: Row, where: str) -> Pair:
    prompt, chosen, rejected = (
        as_prompt(row.get(name)) for name in ("prompt", "chosen", "rejected")
    )
    for name, value in (("chosen", chosen), ("rejected", rejected), ("prompt", prompt)):
        fault = "" if name == "prompt" and value is None else fault_of_prompt(value, name)
        if fault:
            message = '{"role": ..., "content": text}'
            raise Refused(
                f"{where}: {fault}; it must be text, or a list of chat messages {message}."
            )
    chats = not isinstance(chosen, str)
    alike = chats != isinstance(rejected, str)
    repeated = chats and alike and chosen[0]["content"] == rejected[0]["content"] == prompt
    if not alike or (chats and isinstance(prompt, str) and not repeated):
        problem = (
            f"{where}: some of prompt, chosen and rejected are text and others are chat messages."
        )
        raise Refused(
            f"{problem} Give them alike; only a prompt of messages may stand before text."
        )
    if prompt is None or repeated:  # some data sets repeat the first message as the prompt
        cut = _common(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
    margin, *golds = (
        _number(row, name, where) for name in ("margin", "chosen_gold", "rejected_gold")
    )
    return Pair(prompt, chosen, rejected, margin, None if None in golds else (golds[0], golds[1]))  # type: ignore[arg-type]


def _common(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    """Count the messages or characters that both begin with; text is cut at a space, not within a word."""
    cut = 0
    while cut < min(len(chosen), len(rejected)) and chosen[cut] == rejected[cut]:
        cut += 1
    return max(0, chosen.rfind(" ", 0, cut)) if isinstance(chosen, str) else cut


def _number(row: Row, name: str, where: str) -> float | None:
    """Return the number in a column; None without the column, or where it has no value."""
    value = row.get(name)
    if value is not None:
        check_number(f"{where}: {name}", value)
    return None if value is None else float(value)


def hold_out(pairs: Sequence[Pair], size: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into training and evaluation so that no prompt is in both.

    Prompts are held out until they have `size` pairs or a fifth of all pairs, whichever is less. If all pairs
    have the same prompt, single pairs are held out instead.

    Raises:
        Refused: there are too few pairs to split.
    """
    one_prompt = len({pair.key for pair in pairs}) == 1
    keys = [str(i) if one_prompt else pair.key for i, pair in enumerate(pairs)]
    distinct = Counter(keys)
    if size < 1 or len(distinct) < 2:
        problem = f"eval_size={size} of {len(pairs)} different pairs: to train on some and evaluate on others"
        raise Refused(f"{problem}, give an eval_size of at least 1 and at least 2 pairs.")
    target, held, count = min(size, max(1, len(pairs) // 5)), set[str](), 0
    names = list(distinct)
    for number in np.random.default_rng([seed, 2]).permutation(len(names))[:-1]:
        if count < target:
            held.add(names[number])
            count += distinct[names[number]]
    train = [pair for pair, key in zip(pairs, keys, strict=True) if key not in held]
    return train, [pair for pair, key in zip(pairs, keys, strict=True) if key in held]


MOSTLY = 0.95
"""From this share of pairs on in which the longer (or shorter) one is chosen, length explains the choices."""
MANY = 0.5
"""From this share of held-out pairs on that are trained on too, the evaluation is worth nothing."""


def check_pairs(session: Session, train: Sequence[Pair], held_out: Sequence[Pair]) -> int:
    """Look for mistakes in the pairs, print what was found, and return the exit code.

    Args:
        session: the session of the run, which has been opened.
        train: the pairs to train on.
        held_out: the pairs to evaluate on.
    """
    trained = {repr((pair.prompt, pair.chosen, pair.rejected)) for pair in train}
    repeated = sum(repr((pair.prompt, pair.chosen, pair.rejected)) in trained for pair in held_out)
    swapped = sum(repr((pair.prompt, pair.rejected, pair.chosen)) in trained for pair in train)
    texts = (
        completion_texts([getattr(pair, name) for pair in train]) for name in ("chosen", "rejected")
    )
    gaps = [len(chosen) - len(rejected) for chosen, rejected in zip(*texts, strict=True)]
    longer, shorter = (sum(sign * gap > 0 for gap in gaps) / len(train) for sign in (1, -1))
    which, share = ("longer", longer) if longer > shorter else ("shorter", shorter)
    findings = []
    if repeated:
        weight: Weight = "void" if repeated >= MANY * len(held_out) else "watch"
        text = f"{repeated:,} of {len(held_out):,} held-out pairs are also trained on: take them out of it."
        findings.append(Finding("held-out-in-training", weight, text))
    if swapped:
        weight = "void" if swapped == len(train) else "watch"
        text = (
            f"{swapped:,} of {len(train):,} training pairs are there in both orders: take them out."
        )
        findings.append(Finding("contradictory-pairs", weight, text))
    if share >= MOSTLY:
        text = f"In {share:.0%} of the training pairs the {which} completion is chosen: a reward model may"
        text = f"{text} learn that alone. Add pairs in which it is the other way."
        findings.append(Finding("length-decides", "watch", text))
    measured = {
        "pairs": f"{len(train):,} to train on, {len(trained):,} of them distinct; {len(held_out):,} held out",
        "chosen": f"the longer in {longer:.0%}, the shorter in {shorter:.0%}",
    }
    return conclude(session, "data, model and loss", measured, findings)
