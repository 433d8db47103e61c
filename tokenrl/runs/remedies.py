"""What helps a training in which something is wrong: sentences and settings that several rules advise."""

from __future__ import annotations

import math
from typing import Any

from tokenrl.runs.facts import MOST, Facts

SOLVED = "The policy already solves these prompts: take harder ones, or evaluate it (tokenrl evaluate)."


def slower(facts: Facts) -> tuple[str, dict[str, float]]:
    """Say that the learning rate is the likely cause of a loss; return that with the rate to take instead."""
    rate, usual = facts["learning_rate"], facts.get("usual_rate", 0.0)  # 0: nobody knows
    above_usual = 0 < usual < rate
    mend = usual if above_usual else rate / 4
    known = f", {'which' if above_usual else f'although {usual:g}'} is usual here" if usual else ""
    text = f"The learning rate, {rate:g}, is the likely cause: try --learning-rate {mend:g}{known}."
    return text, {"learning_rate": mend}


def remedy(facts: Facts) -> str:
    """Say what helps most where rewards do not differ.

    `pass_mark` is the reward that counts as solved; `can_warm_start` says that there are demonstrations that
    have not been used; `uncut` says what lets completions end that are cut.
    """
    if "num_envs" in facts:
        text = (
            "Reward steps towards the goal, start nearer to it, let more episodes be tried (--num-envs), or "
        )
        return text + "make them longer (--max-episode-steps, --num-steps), so that some reach something."
    if facts.get("step_reward", -math.inf) >= facts.get("pass_mark", math.inf):
        return SOLVED
    if facts.get("can_warm_start"):
        return "This model cannot do the task yet: add --warm-start, to begin with the task's demonstrations."
    if facts.get("step_cut", 0) >= MOST:
        text = "{step_cut:.0%} of the completions are cut at {max_completion_length} tokens, before an end: "
        return text + "{uncut}"
    text = (
        "Use prompts that the policy sometimes solves, a graded reward, demonstrations first (--warm-start, "
    )
    return text + "or tokenrl sft), or more generations per prompt."


def doubled(facts: Facts, *names: str) -> dict[str, Any]:
    """Return twice the value of the first of some settings that the command has."""
    return next(({name: 2 * facts[name]} for name in names if name in facts), {})
