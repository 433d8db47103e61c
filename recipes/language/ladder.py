"""The ladder: four estimators on one task, each rung a change of the estimator alone.

    python recipes/language/ladder.py vanilla                 or running_mean, rloo, grpo
    python recipes/language/ladder.py vanilla --shift 1       the same problem with rewards of 1 and 2

A tiny model that was mostly taught to sort digits in descending order learns to sort them in ascending
order, from a reward of 1 for each right answer. The estimate of the gradient is the mean over completions
of A_i * grad log pi(y_i); the rungs differ in the advantage A_i.

1. `vanilla`: REINFORCE as Williams wrote it in 1992, A_i = R_i. Its expectation is the gradient. With
   rewards 0 and 1 only right answers are reinforced, and here that works: as fast as on the next rungs, or
   faster. But this depends on where the zero lies. Rewards of 1 and 2 (--shift 1) have the same expected
   gradient, but now every answer is reinforced, wrong ones too, and the difference between them drowns in
   noise.

2. `running_mean`: A_i = R_i - b, then b <- 0.9 b + 0.1 mean(R). b contains no reward of this step, so the
   gradient stays exact, and as b follows the rewards, a shift has no effect after some steps. `grad_norm`
   in metrics.jsonl is no smaller than rung 1's: the wrong answers that remain are unlikely ones, and these
   have large scores S = grad log pi(y). The constant of least variance is E[|S|^2 R] / E[|S|^2]; when the
   wrong answers have the large scores, it is nearer to 0 than to the mean. The mean is not optimal, but it
   works wherever the zero of the reward lies.

3. `rloo`, REINFORCE leave-one-out: A_i = R_i - mean of the other G - 1 rewards of the same prompt.
   Completions of hard and of easy prompts are compared with each other only, and no running mean has to
   settle first. A completion is not in its own baseline, so the gradient is exact. A prompt whose
   completions are all right or all wrong has no gradient (`frac_reward_zero_std` is the share of such
   prompts).

4. `grpo` (arXiv 2402.03300): A_i = (R_i - mean of the group) / (std of the group + 1e-4). The mean now
   contains R_i itself; each completion is averaged over its own tokens, not summed; and the ratio to the
   policy that sampled is clipped (with one update per rollout it is always 1). The std and the average over
   tokens make the gradient biased: prompts that are rarely solved, or rarely failed, count for more, and
   the tokens of long completions for less.

Expect: most answers right on every rung, with --shift 1 far fewer on the first, or none. The fourth does
about as well as the third, since sorted digits all have one length; its `grad_norm` is smaller by that
length.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from typing import Literal

import tyro

import tokenrl
import toy_tasks

RUNGS = {
    "vanilla": tokenrl.Estimator(baseline="none"),
    "running_mean": tokenrl.Estimator(baseline="running_mean"),
    "rloo": tokenrl.Estimator(baseline="rloo"),
    "grpo": tokenrl.Estimator.preset("grpo"),
}


def main(
    rung: tyro.conf.Positional[Literal["vanilla", "running_mean", "rloo", "grpo"]],
    max_steps: int = 100,
    shift: float = 0.0,
    seed: int = 0,
) -> None:
    task, estimator = toy_tasks.load("sort_digits"), RUNGS[rung]

    def right(
        prompts, completions, **_
    ):  # 1 for a right answer, 0 for a wrong one, and shift added to both
        return [reward + shift for reward in task.reward(prompts, completions)]

    print(f"bias of the gradient: {estimator.bias_status} ({estimator.bias_reason})")
    result = tokenrl.train(
        task="sort_digits",
        reward=right,
        estimator=estimator,
        max_steps=max_steps,
        seed=seed,
        output_dir=f"runs/ladder_{rung}",
        overwrite=True,  # a rung takes the place of its own last run
    )
    print(
        f"right answers on held-out prompts, greedy: {result.eval_after['reward_greedy'] - shift:.3f}"
    )


if __name__ == "__main__":
    tyro.cli(main)
