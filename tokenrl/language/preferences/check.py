"""Checks the pairs of a reward model before its first update (`--check`)."""

from __future__ import annotations

from collections.abc import Sequence

from tokenrl.language.preferences.pairs import Pair
from tokenrl.language.rewards.library import completion_texts
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
    texts = (completion_texts([getattr(pair, name) for pair in train]) for name in ("chosen", "rejected"))
    gaps = [len(chosen) - len(rejected) for chosen, rejected in zip(*texts, strict=True)]
    longer, shorter = (sum(sign * gap > 0 for gap in gaps) / len(train) for sign in (1, -1))
    which, share = ("longer", longer) if longer > shorter else ("shorter", shorter)
    findings = []
    if seen:
        weight: Weight = "void" if seen >= MANY * len(held_out) else "watch"
        said = f"{seen:,} of {len(held_out):,} held-out pairs are also trained on: take them out of it."
        findings.append(Finding("held-out-in-training", weight, said))
    if swapped:
        weight = "void" if swapped == len(train) else "watch"
        said = f"{swapped:,} of {len(train):,} training pairs are there in both orders: take them out."
        findings.append(Finding("contradictory-pairs", weight, said))
    if share >= MOSTLY:
        said = f"In {share:.0%} of the training pairs the {which} completion is chosen: a reward model may"
        said = f"{said} learn that alone. Add pairs in which it is the other way."
        findings.append(Finding("length-decides", "watch", said))
    measured = {
        "pairs": f"{len(train):,} to train on, {len(known):,} of them distinct; {len(held_out):,} held out",
        "chosen": f"the longer in {longer:.0%}, the shorter in {shorter:.0%}",
    }
    return session.conclude("data, model and loss", measured, findings)
