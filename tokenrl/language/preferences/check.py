"""Checks the pairs of a reward model before its first update (`--check`)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tokenrl.language.preferences.pairs import Pair
from tokenrl.runs.findings import Finding, Weight
from tokenrl.runs.session import Session

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
    keys = [_key(pair.prompt, pair.chosen, pair.rejected) for pair in train]
    known = set(keys)
    seen = sum(_key(pair.prompt, pair.chosen, pair.rejected) in known for pair in held_out)
    swapped = sum(_key(pair.prompt, pair.rejected, pair.chosen) in known for pair in train)
    lengths = [(_length(pair.chosen), _length(pair.rejected)) for pair in train]
    shares = {
        "longer": sum(chosen > rejected for chosen, rejected in lengths) / len(train),
        "shorter": sum(chosen < rejected for chosen, rejected in lengths) / len(train),
    }
    findings = []
    if seen:
        text = f"{seen:,} of {len(held_out):,} held-out pairs are also trained on, so that the evaluation "
        text += "rewards learning by heart. Take them out of the training data, or leave --eval-split out, "
        text += "so that prompts are held out."
        findings.append(Finding("held-out-in-training", _weight(seen >= MANY * len(held_out)), text))
    if swapped:
        text = f"{swapped:,} of {len(train):,} training pairs are there in both orders. Each cancels the "
        text += "other, so these teach nothing: take them out of the data."
        findings.append(Finding("contradictory-pairs", _weight(swapped == len(train)), text))
    for which, share in shares.items():
        if share >= MOSTLY:
            text = f"In {share:.0%} of the training pairs the {which} completion is chosen. A reward model "
            text += "can learn that alone, and a policy trained on it change its length alone. Add pairs in "
            text += "which it is the "
            findings.append(Finding("length-decides", "watch", f"{text}other way."))
    measured = {
        "pairs": f"{len(train):,} to train on, {len(known):,} of them distinct; {len(held_out):,} held out",
        "chosen": ", ".join(f"the {which} in {share:.0%}" for which, share in shares.items()),
    }
    return session.conclude("data, model and loss", measured, findings)


def _weight(grave: bool) -> Weight:
    return "void" if grave else "watch"


def _key(prompt: Any, chosen: Any, rejected: Any) -> str:
    return json.dumps([prompt, chosen, rejected], sort_keys=True, default=str)


def _length(completion: Any) -> int:
    """Return the characters of a completion, text or chat messages."""
    if isinstance(completion, str):
        return len(completion)
    return sum(len(str(message.get("content"))) for message in completion)
