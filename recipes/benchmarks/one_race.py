"""Trains with one trainer until a held-out reward of a toy task, and prints the evaluations as a line of JSON.

`step_against_trl.py --until-reward TASK` starts this program for each race; `one_trainer.py` has the training.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
from typing import Any

from one_trainer import Clock, Measured, Policy, Shape, device, train

EVERY, HELD_OUT = 5, 128
"""Steps between the evaluations of a training to a held-out reward, and the prompts of each."""
WINDOW = 4
"""Evaluations whose mean must reach that reward, since single ones are noisy."""


class Watch(Clock):
    """The reward function of a training to a held-out reward, which it ends there.

    `history` has the step, the seconds and the held-out greedy reward of each evaluation, every `EVERY`
    steps. The seconds count from `spec["started"]`, without evaluations and what this class imports.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from transformers import AutoModelForCausalLM  # noqa: F401  # both need it: its import counts

        began = time.time()
        import tokenrl.language as language  # torch is there already: for TRL no variable is set

        self.language, self.spec = language, spec
        self.task = language.load_task(spec["task"])
        self.rewards = language.Rewards(self.task.reward)
        self.policy: Any = None
        self.history: list[tuple[int, float, float]] = []
        length = self.task.max_completion_length
        shape = Shape(prompts=spec["prompts"], group=8, length=length, ends=1)
        super().__init__(shape, spec["steps"], device())
        self.step, self.apart = 0, time.time() - began

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        if len(prompts) == self.shape.prompts * self.shape.group:
            if self.step % EVERY == 0:
                self.evaluate()
            self.step += 1
        rewards: list[float] = self.task.reward(prompts=prompts, completions=completions, **columns)
        return rewards

    def evaluate(self) -> None:
        began = time.time()
        seconds = began - self.spec["started"] - self.apart
        sampling = self.language.Sampling(self.shape.length, 0)
        rows = self.task.eval_prompts[:HELD_OUT]
        metrics = self.language.evaluate_policy(self.policy, rows, self.rewards, sampling).metrics
        self.history.append((self.step, seconds, metrics["reward_greedy"]))
        if recent_reward(self.history) >= self.spec["target"]:
            raise Measured
        self.apart += time.time() - began

    def load(self) -> tuple[Any, Any]:
        """The model and its tokenizer, as users of the trainer load them."""
        if self.spec["who"] == "tokenrl":
            self.policy = self.language.load_policy(self.spec["model"])
            return self.policy.model, self.policy.tokenizer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(self.spec["model"])
        tokenizer = AutoTokenizer.from_pretrained(self.spec["model"])
        began = time.time()
        self.policy = self.language.wrap(model, tokenizer)  # for the evaluations
        self.apart += time.time() - began
        return model, tokenizer


def recent_reward(history: list[tuple[int, float, float]]) -> float:
    """The mean reward of the last `WINDOW` evaluations; minus infinity before there are so many."""
    rewards = [reward for _, _, reward in history[-WINDOW:]]
    return statistics.fmean(rewards) if len(rewards) == WINDOW else -math.inf


def race(spec: dict[str, Any]) -> dict[str, Any]:
    """Train on a toy task until a held-out reward, with a learning rate that falls to 0 over the steps."""
    watch = Watch(spec)
    policy = Policy(*watch.load(), list(watch.task.train_prompts))
    falling = {"learning_rate": 2e-4, "lr_scheduler_type": "linear", "seed": spec["seed"]}
    train(spec, watch, policy, max_completion_length=watch.shape.length, **falling)
    return {"history": watch.history}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    spec = json.loads(sys.argv[1])
    if spec["who"] == "tokenrl":
        import tokenrl  # noqa: F401  # before torch
    print(json.dumps(race(spec)))
