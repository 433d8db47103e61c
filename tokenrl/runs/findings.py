"""What a rule about numbers says: a finding with its weight, and what helps, which several rules advise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenrl.runs.facts import MOST, Facts

Weight = Literal["watch", "act", "void"]
Judgement = tuple[Weight | None, str] | tuple[Weight | None, str, Mapping[str, Any]]
"""What a rule returns: the weight (None for nothing), the sentence with facts in braces, the changes."""
RULES: list[tuple[str, Callable[[Facts], Judgement]]] = []
"""The table: a flag and its rule, in the order in which findings are told."""
SOLVED = "The policy already solves these prompts: take harder ones, or evaluate it (tokenrl evaluate)."


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Attributes:
        flag: a short name for programs, such as `policy-destroyed`.
        weight: `watch` is a remark; `act` says that a setting should change; `void` says that the numbers
            mean nothing as they are: a check is then not passed, and an arm gets no verdict.
        text: one or more whole sentences, with the numbers.
        changes: the settings to change, by name, such as `{"estimator.entropy_coef": 0.01}`.
    """

    flag: str
    weight: Weight
    text: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the finding as one line, its flag first."""
        return f"{self.flag}: {self.text}"


def rule(flag: str) -> Callable[[Callable[[Facts], Judgement]], None]:
    """Enter a rule into the table under a flag."""
    return lambda function: RULES.append((flag, function))


def above(
    number: float, *, watch: float = math.inf, act: float = math.inf, void: float = math.inf
) -> Weight | None:
    """Return the gravest weight whose limit a number exceeds; None if it exceeds none."""
    return "void" if number > void else "act" if number > act else "watch" if number > watch else None


def slower(facts: Facts) -> tuple[str, dict[str, float]]:
    """Say that the learning rate is the likely cause of a loss; return that with the rate to take instead."""
    rate, usual = facts["learning_rate"], facts.get("usual_rate", 0.0)  # 0: nobody knows
    mend = usual if 0 < usual < rate else rate / 4
    known = f", {'which' if mend == usual else f'although {usual:g}'} is usual here" if usual else ""
    text = f"The learning rate, {rate:g}, is the likely cause: try --learning-rate {mend:g}{known}."
    return text, {"learning_rate": mend}


def remedy(facts: Facts) -> str:
    """Say what helps most where rewards do not differ.

    `pass_mark` is the reward that counts as solved; `can_warm_start` says that there are demonstrations that
    have not been used; `uncut` says what lets completions end that are cut. Where completions were
    compared in groups and none differed, it is also said what that means for groups of other sizes.
    """
    if "num_envs" in facts:
        return "Reward steps towards the goal, or try more or longer episodes (--num-envs, --num-steps)."
    if facts.get("step_reward", -math.inf) >= facts.get("pass_mark", math.inf):
        return SOLVED
    text = "Use prompts that the policy sometimes solves, a graded reward, demonstrations (tokenrl sft), "
    text += "or more generations per prompt."
    if facts.get("can_warm_start"):
        text = "This model cannot do the task yet: add --warm-start, to begin with the task's demonstrations."
    elif facts.get("step_cut", 0) >= MOST:
        text = (
            "{step_cut:.0%} of completions are cut at {max_completion_length} tokens, before an end: {uncut}"
        )
    if not (facts.get("steps_without_signal") and facts.get("needs_groups")):
        return text
    tried = facts["steps_without_signal"] * facts["prompts_per_step"] * facts["num_generations"]
    most = min(0.5, 1 - 0.05 ** (1 / tried))  # if more differed, 95 % of samples would show one
    shares = ", ".join(f"{share:.0%}" for share in groups_without_signal(most).values())
    text += f" None of {tried:,} completions differed, so at most {most:.2g} of all do (95 % confidence), "
    return text + f"and at least {shares} of groups of 2, 4, 8, 16 have equal rewards."


def groups_without_signal(rate: float) -> dict[int, float]:
    """Return the chance that all of 2, 4, 8 and 16 completions succeed or all fail, at this rate each."""
    return {size: rate**size + (1 - rate) ** size for size in (2, 4, 8, 16)}


def doubled(facts: Facts, *names: str) -> dict[str, Any]:
    """Return twice the value of the first of some settings that the command has."""
    return next(({name: 2 * facts[name]} for name in names if name in facts), {})
