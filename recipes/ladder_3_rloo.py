"""Rung 3: REINFORCE leave-one-out. A_i = R_i - mean of the other G - 1 rewards of the same prompt.

Changed: each prompt has its own baseline, so completions of hard and of easy prompts are compared with each
other only, and no running mean has to settle first. A completion is not in its own baseline, so the gradient
is exact. A prompt whose completions are all right or all wrong has no gradient (`frac_reward_zero_std` is the
share of such prompts).

Expect: most answers right, with any --shift, since it cancels (except for rounding).
"""

import tyro

import tokenrl
import toy_tasks


def main(
    max_steps: int = 100, shift: float = 0.0, seed: int = 0, output_dir: str = "runs/ladder_3_rloo"
) -> None:
    task = toy_tasks.load("sort_digits")

    def right(prompts, completions, **_):  # 1 for a right answer, 0 for a wrong one, and shift added to both
        return [reward + shift for reward in task.reward(prompts, completions)]

    estimator = tokenrl.Estimator(baseline="rloo")
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
