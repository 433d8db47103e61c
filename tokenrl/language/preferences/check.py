"""Checks the pairs of a reward model before its first update (`--check`)."""

from __future__ import annotations

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
    known = {repr((pair.prompt, pair.chosen, pair.rejected)) for pair in train}
    seen = sum(repr((pair.prompt, pair.chosen, pair.rejected)) in known for pair in held_out)
    swapped = sum(repr((pair.prompt, pair.rejected, pair.chosen)) in known for pair in train)
    gaps = [_length(pair.chosen) - _length(pair.rejected) for pair in train]
    longer, shorter = (sum(sign * gap > 0 for gap in gaps) / len(train) for sign in (1, -1))
    findings: list[tuple[str, Weight, str]] = []
    if seen:
        text = f"{seen:,} of {len(held_out):,} held-out pairs are also trained on: take them out of the "
        text += "training data, or leave --eval-split out, so that prompts are held out."
        findings.append(("held-out-in-training", "void" if seen >= MANY * len(held_out) else "watch", text))
    if swapped:
        text = f"{swapped:,} of {len(train):,} training pairs are there in both orders, which cancel each "
        text += "other: take them out of the data."
        findings.append(("contradictory-pairs", "void" if swapped == len(train) else "watch", text))
    for which, share in (("longer", longer), ("shorter", shorter)):
        if share >= MOSTLY:
            text = (
                f"In {share:.0%} of the training pairs the {which} completion is chosen: a reward model can "
            )
            text += "learn that alone. Add pairs in which it is the other way."
            findings.append(("length-decides", "watch", text))
    measured = {
        "pairs": f"{len(train):,} to train on, {len(known):,} of them distinct; {len(held_out):,} held out",
        "chosen": f"the longer in {longer:.0%}, the shorter in {shorter:.0%}",
    }
    return session.conclude("data, model and loss", measured, [Finding(*found) for found in findings])


def _length(completion: Any) -> int:
    """Return the characters of a completion, text or chat messages."""
    return len(
        completion if isinstance(completion, str) else "".join(str(m.get("content")) for m in completion)
    )
