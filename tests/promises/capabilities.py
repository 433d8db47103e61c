"""The capabilities of `tokenrl train` that older promises must hold for, an entry each, and rows in which they meet.

A new capability adds its entry here first. Capabilities of one slot exclude each other. `covering` makes as few rows as
it can in which each two of different slots meet once, but for those of `REFUSED`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import NamedTuple


class Capability(NamedTuple):
    """An entry of the matrix.

    Attributes:
        slot: what it is a choice of.
        flags: what makes a run use it.
        code: the user's function that it calls, by its name in `mine.py`; empty if there is none.
    """

    slot: str
    flags: str
    code: str = ""


CAPABILITIES = {
    "replay": Capability("rows", "--replay 2 --replay-memory 3"),
    "logged rows": Capability("rows", "--rows log.jsonl"),
    "half logged": Capability("rows", "--rows rewarded.jsonl --rows-share 0.5"),
    "refills": Capability("rows", "--estimator.zero-spread refill --max-refills 1"),
    "old weights": Capability("sampler", "--sync-every 2"),
    "importance": Capability("sampler", "--estimator.importance token"),
    "truncated distribution": Capability("sampler", "--top-k 7 --temperature 0.8"),
    "memory": Capability("baseline", "--estimator.baseline tracker"),
    "critic first": Capability(
        "baseline", "--estimator.baseline value --value-warmup 2 --value-learning-rate 0.01"
    ),
    "greedy": Capability("baseline", "--estimator.baseline remax"),
    "own baseline": Capability("baseline", "--estimator.baseline mine.py:baseline", "baseline"),
    "own advantage": Capability("baseline", "--estimator.baseline mine.py:advantage", "advantage"),
    "target": Capability(
        "baseline", "--estimator.baseline none --estimator.scale target --estimator.eta 0.5"
    ),
    "kl control": Capability(
        "kl", "--estimator.beta 0.1 --estimator.kl-placement loss --target-kl 0.001"
    ),
    "own teacher": Capability(
        "kl",
        "--estimator.beta 0.1 --teacher self --teacher-decay 0.5 --teacher-template {prompt}ab",
    ),
    "context": Capability(
        "kl", "--estimator.beta 0.1 --teacher self --teacher-context mine.py:context", "context"
    ),
    "two rewards": Capability(
        "reward", "--reward mine.py:reward mine.py:shorter --reward-weights 0.6 0.3", "shorter"
    ),
    "abstentions": Capability("reward", "--reward mine.py:silent --on-abstain leave-out", "silent"),
    "counting reward": Capability("reward", "--reward mine.py:counting", "counting"),
    "errors": Capability("reward", "--reward mine.py:broken --on-reward-error abstain", "broken"),
    "prompts by variance": Capability("prompts", "--prompt-weights variance"),
    "prompts by function": Capability("prompts", "--prompt-weights mine.py:weights", "weights"),
    "several updates": Capability(
        "updates", "--estimator.ratio token --num-iterations 2 --num-minibatches 2"
    ),
    "several passes": Capability(
        "updates",
        # At the rate of the other runs the policy writes a single text after two steps.
        "--estimator.ratio delight --num-iterations 2 --learning-rate 0.0003",
    ),
    "micro-batches": Capability("updates", "--micro-batch-size 3"),
    "adapter": Capability("weights", "--lora-r 2"),
    "muon": Capability("weights", "--optimizer muon --learning-rate 0.001"),
    "keep best": Capability("weights", "--keep best --patience 9"),
    "entropy": Capability("objective", "--estimator.entropy-coef 0.01"),
    "best of several": Capability(
        "baseline",
        "--estimator.baseline none --estimator.objective max_at_k --estimator.objective-order 2",
    ),
    "best share": Capability(
        "baseline",
        # At the rate of the other runs the policy writes a single text after one step.
        "--estimator.baseline none --estimator.objective quantile --estimator.objective-share 0.5"
        " --learning-rate 0.0003",
    ),
    "goal": Capability("end", "--stop-at-reward 99"),
    "allowed": Capability("rule", "--allowed mine.py:rule", "rule"),
    "random rewards": Capability("control", "--control-arm random"),
    "best of n": Capability("control", "--control-arm best_of_n"),
    "turns": Capability("task", "--environment mine.py:Turns --max-turns 2", "Turns"),
}
UNEVEN = ("prompts by function", "prompts by variance", "refills", "turns")
CONTROLS = ("best of n", "random rewards")
OF_CONTROLS = {
    tuple(
        sorted((control, name))
    ): "is for rewards of completions of one turn, and for prompts that are drawn equally"
    for control in CONTROLS
    for name in UNEVEN
}
OF_LOGS = {
    tuple(sorted((log, name))): f"rows cannot be learnt with {words}"
    for log in ("logged rows", "half logged")
    for name, words in {
        "old weights": "sync_every",
        "truncated distribution": "top_k, top_p or min_p",
        "prompts by variance": "prompt_weights",
        "prompts by function": "prompt_weights",
        "allowed": "allowed",
        "turns": "an environment",
        "own teacher": "a teacher that reads other prompts",
        "context": "a teacher that reads other prompts",
        "greedy": "a baseline of yours or remax",
        "own baseline": "a baseline of yours or remax",
        "own advantage": "a baseline of yours or remax",
        **dict.fromkeys(CONTROLS, "a control arm"),
    }.items()
}
REFUSED: Mapping[tuple[str, ...], str] = (OF_CONTROLS | OF_LOGS) | {
    ("replay", "turns"): "replay was given as 2; it repeats completions of one turn",
    ("goal", "refills"): "perhaps the first that reached it",
    ("prompts by variance", "refills"): "with prompt_weights they would not be remembered",
    ("prompts by function", "refills"): "with prompt_weights they would not be remembered",
    ("best of several", "own teacher"): "is about rewards alone, and a KL in the reward is not one",
    ("best of several", "context"): "is about rewards alone, and a KL in the reward is not one",
    ("best share", "own teacher"): "is about rewards alone, and a KL in the reward is not one",
    ("best share", "context"): "is about rewards alone, and a KL in the reward is not one",
    ("counting reward", "keep best"): "The best checkpoint needs evaluations, and none are made",
    ("greedy", "old weights"): "without greedy completions (baseline remax)",
}
"""Pairs that a run refuses, with some of its words."""


def covering(capabilities: Mapping[str, Capability] = CAPABILITIES) -> list[tuple[str, ...]]:
    """Return rows of capabilities in which each two that can meet do so.

    Each row begins with a pair that has not met, and takes in each slot what meets most others anew.
    """
    open_pairs = dict.fromkeys(pairs(capabilities))
    rows = []
    while open_pairs:
        row = [*next(iter(open_pairs))]
        while candidates := [name for name in capabilities if fits(name, row, capabilities)]:
            new = {name: sum(pair(name, each) in open_pairs for each in row) for name in candidates}
            best = max(candidates, key=new.__getitem__)
            if not new[best]:
                break
            row.append(best)
        for each in combinations(row, 2):
            open_pairs.pop(pair(*each), None)
        rows.append(tuple(sorted(row)))
    return rows


def pairs(capabilities: Mapping[str, Capability] = CAPABILITIES) -> Iterator[tuple[str, str]]:
    """Yield each two capabilities of different slots that a run takes together."""
    for a, b in combinations(capabilities, 2):
        if fits(b, [a], capabilities):
            yield pair(a, b)


def pair(a: str, b: str) -> tuple[str, str]:
    """Return two names in the order of the alphabet."""
    return min(a, b), max(a, b)


def fits(name: str, row: list[str], capabilities: Mapping[str, Capability]) -> bool:
    """Return whether a capability can join others."""
    slots = [capabilities[each].slot for each in row]
    free = capabilities[name].slot not in slots
    return free and not any(pair(name, each) in REFUSED for each in row)
