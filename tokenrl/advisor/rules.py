"""The thresholds that advice before a run and the diagnosis of a run share. Imports no torch.

Those that training itself uses stand in `core.entropy`, `core.guards` and `core.kl`.
"""

from __future__ import annotations

FINE, WATCH, ACT = "fine", "watch", "act"
"""The verdicts of a diagnosis."""

DEAD_GROUPS = 0.5
"""A group size may have at most this share of dead groups, whose rewards are all equal: no gradient."""
SMALLEST_GROUP = 4
"""A leave-one-out baseline of G - 1 others adds 1 / (G - 1) of the variance: groups of two double it."""
HOPELESS, EASY = 0.9, 0.95
"""A task is too hard above this share of dead groups of the largest size, too easy from this pass@1 on."""
CUT = 0.1
"""From this share of completions that are cut on, the largest length should grow."""
ENTROPY = 0.01
"""Entropy bonus, in standard deviations of what the advantages are made of (1 where they are whitened)."""
CLOSE = 1.1
"""A baseline is as good as the best if its noise is at most this many times the lowest."""
WEAK_SIGNAL = 0.1
"""Below this signal-to-noise ratio of an update, ten updates in a row are needed to see a direction."""
CLIPPED = 0.3
"""Above this share of clipped tokens, most of the later passes over a rollout are lost."""
SKIPPED = 0.01
"""Above this share of updates skipped for a gradient that was not finite, the run is not healthy."""


def cut_too_often(share: float) -> bool:
    """Whether so many completions are cut that the largest length should grow."""
    return share >= CUT


def mostly_dead(share: float) -> bool:
    """Whether too many groups have equal rewards, and so no gradient."""
    return share > DEAD_GROUPS


def one_figure(number: float) -> float:
    """Round to one significant figure, since only the order of magnitude matters."""
    return float(f"{number:.0e}")
