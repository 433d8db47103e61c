"""Rung 4: GRPO (arXiv 2402.03300). A_i = (R_i - mean of the group) / (std of the group + 1e-4).

Changed: the mean now contains R_i itself; the advantage is divided by the group's std; each completion is
averaged over its own tokens, not summed; and the ratio to the policy that sampled is clipped (with one
update per rollout it is always 1). The std and the average over tokens make the gradient biased: prompts that
are rarely solved, or rarely failed, count for more, and the tokens of long completions for less.

Expect: about the same as rung 3, since sorted digits all have one length; `grad_norm` is smaller by that
length.
"""

import tyro

import tokenrl
import toy_tasks


def main(
    max_steps: int = 100, shift: float = 0.0, seed: int = 0, output_dir: str = "runs/ladder_4_grpo"
) -> None:
    task = toy_tasks.load("sort_digits")

    def right(prompts, completions, **_):  # 1 for a right answer, 0 for a wrong one, and shift added to both
        return [reward + shift for reward in task.reward(prompts, completions)]

    estimator = tokenrl.Estimator.preset("grpo")
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
