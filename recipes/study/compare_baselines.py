"""Which baseline should I use, and how sure may I be? Four arms on two tasks, six seeds of each.

sort_digits ends at the ceiling: with the usual budget every arm answers nearly all prompts, so what differs
is how fast it gets there. reverse_text is graded and has no ceiling in reach. All arms are compared
after the same number of completions, from the same initial weights, on the same prompts with the same random
numbers.

Look for, in this order: the verdicts, which come from differences paired by seed; the sentences below them,
which say what a difference does not mean; the greedy reward and the entropy of each arm.

Killed and started again, the program goes on where it was. `--seeds 2 --max-steps 40` is a quick look.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

import tyro

import tokenrl


def main(
    tasks: tuple[str, ...] = ("sort_digits", "reverse_text"),
    arms: tuple[str, ...] = ("reinforce", "reinforce_running_mean", "rloo", "grpo"),
    seeds: int = 6,
    max_steps: int | None = None,
    output_dir: str = "runs/compare_baselines",
) -> None:
    settings = {} if max_steps is None else {"max_steps": max_steps}
    comparison = tokenrl.compare(
        task=tasks, arms=arms, seeds=seeds, output_dir=output_dir, **settings
    )
    for family in comparison.judgement.families:
        for difference in family.differences:
            low, high = difference.adjusted[1:]
            interval = f"{difference.mean.value:+.4f} [{low:+.4f}, {high:+.4f}]"
            words = f"{interval} {difference.verdict}"
            print(f"{family.problem}: {difference.arm} against {family.reference}: {words}")


if __name__ == "__main__":
    tyro.cli(main)
