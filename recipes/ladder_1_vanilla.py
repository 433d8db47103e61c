"""Rung 1: REINFORCE as Williams wrote it in 1992, without a baseline. A_i = R_i.

The estimate is the mean over completions of A_i * grad log pi(y_i), and its expectation is the gradient.
With rewards 0 and 1 only right answers are reinforced, and here that works: as fast as on the next rungs, or
faster. But this depends on where the zero lies. Rewards of 1 and 2 (--shift 1) define the same problem and
have the same expected gradient, but now every answer is reinforced, wrong ones too, and the difference
between them drowns in noise.

Expect: most answers right; with --shift 1 far fewer, or none.
"""

import tyro

import tokenrl
import toy_tasks


def main(
    max_steps: int = 100, shift: float = 0.0, seed: int = 0, output_dir: str = "runs/ladder_1_vanilla"
) -> None:
    task = toy_tasks.load("sort_digits")

    def right(prompts, completions, **_):  # 1 for a right answer, 0 for a wrong one, and shift added to both
        return [reward + shift for reward in task.reward(prompts, completions)]

    estimator = tokenrl.Estimator(baseline="none")
    print(f"bias of the gradient: {estimator.bias_status} ({estimator.bias_reason})")
    result = tokenrl.train(
        task="sort_digits",
        reward=right,
        estimator=estimator,
        max_steps=max_steps,
        seed=seed,
        output_dir=output_dir,
        overwrite=True,  # a rung takes the place of its own last run
    )
    print(f"right answers on held-out prompts, greedy: {result.eval_after['reward_greedy'] - shift:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
