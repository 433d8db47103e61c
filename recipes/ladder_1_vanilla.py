"""Rung 1: REINFORCE as Williams wrote it in 1992, without a baseline. A_i = R_i.

The reward here is 0 or 1, so only right answers push, and always upwards: a wrong answer teaches nothing, and
once most answers are right nearly every sample still pushes, which is noise. The gradient is exact all the
same. Expect: it learns, with the noisiest gradient of the four rungs.
"""

import tyro

import tokenrl


def main(max_steps: int = 100, seed: int = 0, output_dir: str = "runs/ladder_1_vanilla") -> None:
    estimator = tokenrl.Estimator(baseline="none")
    print(f"bias: {estimator.bias_status} ({estimator.bias_reason})")
    result = tokenrl.train(
        task="sort_digits",
        estimator=estimator,
        max_steps=max_steps,
        seed=seed,
        output_dir=output_dir,
        overwrite=True,  # each rung replaces its own last run
    )
    print(f"held-out greedy reward: {result.eval_after['reward_greedy']:.3f}")


if __name__ == "__main__":
    tyro.cli(main)
