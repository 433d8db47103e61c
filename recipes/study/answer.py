"""The first figure of the study: how far each arm is from RLOO on each task of question 1."""

from __future__ import annotations

from judging import COLOURS, COPY, MARGIN, describe
from matplotlib.axes import Axes
from questions import COPIES, judged

ARMS = {
    "reinforce": "no baseline (reinforce)",
    "remax": "ReMax",
    "reinforce_running_mean": "running mean",
    "reinforce_baseline": "mean of the step",
    "grpo": "GRPO",
    "opo": "OPO",
    "reinforce_pp": "REINFORCE++",
    "dr_grpo": "Dr. GRPO",
}
"""The rows from top to bottom, and their names."""
TASKS = {
    "1_reverse_text": "reverse_text",
    "1_countdown": "countdown",
    "1_sort_digits": "sort_digits",
    "1_shifted": "sort_digits, rewards + 1",
}
"""The parts from the top to the bottom of a row, and what they are called."""


def draw(axes: Axes) -> None:
    """Draw a dot for each arm and task; those outside of the margin are named."""
    axes.axvspan(-MARGIN, MARGIN, color="#e9e9ee", lw=0)
    axes.axvline(0, color="#b9b9c2", lw=1)
    for place, (part, task) in enumerate(TASKS.items()):
        for arm, difference in judged(part).against_reference.items():
            x = difference.mean.value
            y = list(ARMS).index(arm) + 0.2 * (place - 1.5)
            kind = COPY if arm in COPIES.get(part, {}) else difference.verdict
            axes.plot(x, y, "o", color=COLOURS[kind], ms=7, label=kind)
            if abs(x) > MARGIN:
                offset, side = (7, "left") if x > 0 else (-7, "right")
                axes.annotate(
                    task, (x, y), (offset, 0), textcoords="offset points",
                    ha=side, va="center", color=COLOURS[kind], size=9,
                )  # fmt: skip
    heads = {-0.07: "← behind RLOO", 0: "RLOO ± .02", 0.052: "ahead of RLOO →"}
    for x, text in heads.items():
        axes.text(x, -0.65, text, ha="center", va="center", size=9, color="#5f5f66")
    axes.set_yticks(range(len(ARMS)), ARMS.values())
    axes.set_ylim(len(ARMS) - 0.5, -0.9)
    axes.set_xlim(-0.125, 0.085)
    axes.spines[["top", "right"]].set_visible(False)
    title = "Only two of eight arms leave the band around RLOO, each at its best rate"
    describe(axes, title, "held-out reward, averaged over the training, minus RLOO's")
