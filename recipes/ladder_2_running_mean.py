"""Rung 2: subtract a running mean of past rewards. A_i = R_i - b, then b <- 0.9 b + 0.1 mean(R).

Changed: only the baseline. b contains no reward of this step, so the gradient stays exact. As b follows the
rewards, a shift of all rewards has no effect after some steps. Wrong answers now become less likely.

Expect: most answers right, with --shift 1 as well. `grad_norm` in metrics.jsonl is no smaller than rung 1's:
the wrong answers that remain are unlikely ones, and these have large scores S = grad log pi(y). The
constant of least variance is E[|S|^2 R] / E[|S|^2]; when the wrong answers have the large scores, it is
nearer to 0 than to the mean. The mean is not optimal, but it works wherever the zero of the reward lies.
"""

import tyro

import tokenrl
import toy_tasks


def main(
    max_steps: int = 100, shift: float = 0.0, seed: int = 0, output_dir: str = "runs/ladder_2_running_mean"
) -> None:
    task = toy_tasks.load("sort_digits")

    def right(prompts, completions, **_):  # 1 for a right answer, 0 for a wrong one, and shift added to both
        return [reward + shift for reward in task.reward(prompts, completions)]

    estimator = tokenrl.Estimator(baseline="running_mean")
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
