"""Judges signal and noise of the gradient in a run, or says how to measure them."""

from __future__ import annotations

import math
from statistics import fmean, stdev

from tokenrl.advisor.history import History
from tokenrl.advisor.progress import Progress
from tokenrl.advisor.rules import ACT, FINE, WATCH, WEAK_SIGNAL
from tokenrl.advisor.show import Finding

MEASUREMENTS = 20
"""About how many measurements of the noise are advised for a run."""


def noise_finding(history: History, progress: Progress) -> Finding:
    """Judge the signal-to-noise ratio of an update, averaged over its measurements.

    Each measurement estimates the signal without bias, from two halves of a step, and may be negative; so a
    mean within two standard errors of 0 is no sign of a signal.
    """
    steps, values = history.series("gradient/snr")
    if not values:
        return _not_measured(history, progress)
    rows, name = ("prompts", "prompts_per_step") if history.language else ("environments", "num_envs")
    count = getattr(history.arguments, name)
    mean = fmean(values)
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    text = f"signal-to-noise ratio {mean:.3g}"
    text += "" if math.isnan(error) else f" +- {error:.1g}"
    text += f" of an update of {count} {rows}, over {len(values)} measurements"
    if mean > 0:
        text += f"; signal and noise are equal at about {count / mean:.2g} {rows}"
    verdict = FINE
    changes: dict[str, int] = {}
    if not history.solved and mean <= 2 * error:
        verdict, changes = (WATCH, {}) if progress.gained else (ACT, {name: 2 * count})
        text += "; no signal can be told from the noise"
    elif not history.solved and mean < WEAK_SIGNAL:
        verdict, changes = WATCH, {name: 2 * count}
        text += f"; below {WEAK_SIGNAL:g}, so progress is slow"
    return Finding("gradient noise", verdict, text, mean, (steps[0], steps[-1]), changes)


def _not_measured(history: History, progress: Progress) -> Finding:
    every, asked = max(1, history.arguments.max_steps // MEASUREMENTS), history.arguments.diagnostics_every
    steps, verdict, changes = (1, history.step), FINE, {}
    if asked and history.step >= asked:
        verdict = FINE if history.solved else ACT
        text = "the gradient was 0 in every measurement: nothing is learnt any more"
        return Finding("gradient noise", verdict, text, 0.0, steps, {})
    text = f"first measured at step {asked}" if asked else f"not measured (--diagnostics-every {every} would)"
    if progress.gained or history.solved:
        text += "; the reward has risen by more than its noise, so the gradient has a signal"
    else:
        verdict, changes = WATCH, {} if asked else {"diagnostics_every": every}
        text += "; as the reward does not rise, it would say whether updates are too small"
    return Finding("gradient noise", verdict, text, None, steps, changes)
