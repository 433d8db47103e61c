"""Trains with one trainer until a held-out reward of a toy task, and prints the outcome as a line of JSON.

`step_against_trl.py --until-reward TASK` starts this program for each race; `one_trainer.py` has the training.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import statistics
import time
from typing import Any

from one_trainer import Clock, Measured, Policy, Shape, device, print_measurement, train

EVERY, HELD_OUT = 5, 128
"""Steps between the evaluations of a training to a held-out reward, and the prompts of each."""
WINDOW = 4
"""Evaluations whose mean must reach that reward, since single ones are noisy."""


class Watch(Clock):
    """The reward function of a training to a held-out reward, which it ends there.

    It evaluates every `EVERY` steps. Seconds count from `spec["started"]`, without evaluations and what this
    class imports.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer  # both need it: it counts

        began = time.time()
        import tokenrl.language as language  # torch is there already: for TRL no variable is set

        self.language, self.target, self.began = language, spec["target"], spec["started"]
        self.task = language.load_task(spec["task"])
        self.scorer = language.Rewards(self.task.reward)
        self.rewards: list[float] = []
        shape = Shape(prompts=16, length=self.task.max_completion_length, ends=1)
        super().__init__(shape, spec["steps"], device(spec))
        self.step, self.apart = 0, time.time() - began
        if spec["who"] == "tokenrl":
            self.policy = language.load_policy(spec["model"])
            return
        model = AutoModelForCausalLM.from_pretrained(spec["model"])
        tokenizer = AutoTokenizer.from_pretrained(spec["model"])
        began = time.time()
        self.policy = language.wrap(model, tokenizer)  # for the evaluations
        self.apart += time.time() - began

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        if len(prompts) == self.shape.prompts * self.shape.group:
            if self.step % EVERY == 0:
                self.evaluate()
            self.step += 1
        rewards: list[float] = self.task.reward(prompts=prompts, completions=completions, **columns)
        return rewards

    def evaluate(self) -> None:
        began = time.time()
        self.seconds = began - self.began - self.apart
        sampling = self.language.Sampling(self.shape.length, 0)
        rows = self.task.eval_prompts[:HELD_OUT]
        metrics = self.language.evaluate_policy(self.policy, rows, self.scorer, sampling).metrics
        self.rewards.append(metrics["reward_greedy"])
        if self.reached():
            raise Measured
        self.apart += time.time() - began

    def reached(self) -> bool:
        recent = self.rewards[-WINDOW:]
        return len(recent) == WINDOW and statistics.fmean(recent) >= self.target


def race(spec: dict[str, Any]) -> dict[str, Any]:
    """Train on a toy task until a held-out reward, with a learning rate that falls to 0 over the steps."""
    if spec["who"] == "tokenrl":
        import tokenrl  # noqa: F401  # before torch
    watch = Watch(spec)
    policy = Policy(watch.policy.model, watch.policy.tokenizer, list(watch.task.train_prompts))
    falling = {"learning_rate": 2e-4, "lr_scheduler_type": "linear", "seed": spec["round"]}
    train(spec, watch, policy, max_completion_length=watch.shape.length, **falling)
    if not watch.reached():
        return {"error": f"{watch.rewards[-1]:.2f} at last"}
    steps = EVERY * (len(watch.rewards) - 1)
    return {"seconds": watch.seconds, "start": watch.rewards[0], "steps": steps}


if __name__ == "__main__":
    print_measurement(race)
