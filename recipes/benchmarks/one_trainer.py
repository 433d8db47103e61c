"""Measures one trainer on one shape of work, and prints the result as a line of JSON.

`step_against_trl.py` starts this program for each of its measurements, so that the peak of the memory belongs
to that measurement alone. This program also holds the shapes of work. To repeat a measurement by hand:

    python recipes/benchmarks/one_trainer.py '{"who": "tokenrl", "work": "short", "steps": 4}'
    python recipes/benchmarks/one_trainer.py '{"who": "trl", "work": "short", "steps": 4, "bf16": true}'
    python recipes/benchmarks/one_trainer.py '{"part": "device"}'

The reward function is the clock: both trainers call it once a step, so a step lasts from one call to the next
and includes all that a trainer does. The peak is read at the last of these calls, which ends the training, so
that nothing is saved. With `"cpu": true` both leave a GPU alone.

A process that measures tokenrl imports it before torch, as the command does: it sets a variable that OpenMP
reads when torch is loaded. One that measures TRL leaves OpenMP alone.

The seconds of a step are the median without the first 3 steps (of fewer than 6 steps, the first).

Look for: an error if a step has other tokens than prompts x group x length, where no completion may end early.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

LETTERS = "".join(chr(c) for c in range(33, 127))


@dataclass(frozen=True)
class Shape:
    """A model and the work of a step; the defaults are a Llama of 1 M parameters."""

    prompts: int = 8
    group: int = 8
    prompt: int = 10  # tokens
    length: int = 32  # tokens of a completion, at most
    ends: int = 0  # how many words of the vocabulary end a completion; 0: none ends early
    binary: bool = False  # rewards of 0 and 1, of which a seventh is 1
    lora_r: int = 0
    vocabulary: int = 96
    layers: int = 4
    hidden: int = 128
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 4
    tied: bool = False  # whether head and embedding are the same weights
    architecture: str = "llama"
    context: int = 512  # tokens


M135 = {
    "vocabulary": 49_152,
    "layers": 30,
    "hidden": 576,
    "intermediate": 1536,
    "heads": 9,
    "kv_heads": 3,
    "prompts": 4,
    "tied": True,
}
WORK = {
    "fixed": Shape(),
    "long_prompt": Shape(prompt=64),
    "longer_prompt": Shape(group=4, prompt=128, length=64),
    "long": Shape(length=128),
    "short": Shape(prompts=16, length=8),
    "verifiable": Shape(ends=6, binary=True),
    "vocabulary": Shape(length=64, vocabulary=50_000),
    "135m": Shape(**M135),
    "lora": Shape(**M135, prompt=40, length=48, lora_r=8),
}
LONG = {"prompts": 8, "prompt": 64, "length": 128}
QWEN = {"vocabulary": 151_936, "kv_heads": 2, "tied": True}
TINY = Shape(
    prompts=2, group=4, length=4, layers=1, hidden=16, intermediate=16, heads=2, kv_heads=1
)
GPU_WORK = {
    "gpu-1m": Shape(**LONG),
    "gpu-135m": Shape(**M135 | LONG),
    "gpu-0.5b": Shape(**QWEN | LONG, layers=24, hidden=896, intermediate=4864, heads=14),
    "gpu-1.5b": Shape(**QWEN | LONG, layers=28, hidden=1536, intermediate=8960, heads=12),
}


SHAPES = {**WORK, **GPU_WORK, "tiny": TINY}


def device(spec: dict[str, Any]) -> str:
    """The kind of device that both trainers take; the CPU where `spec` asks for it."""
    import torch

    if spec.get("cpu"):
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def steady(values: Sequence[float]) -> float:
    """The median without the first steps."""
    return statistics.median(values[3 if len(values) >= 6 else 1 :])


class Measured(KeyboardInterrupt):
    """Ends a training after its last measured step as Ctrl-C would: without a word, and nothing is saved."""


class Clock:
    """The reward function of both trainers: something cheap that differs within a group.

    It ends the training at its last call, of `steps`.
    """

    def __init__(self, shape: Shape, steps: int, kind: str) -> None:
        self.__name__, self.shape = "reward", shape
        self.steps, self.kind = steps, kind
        self.calls: list[float] = []
        self.tokens: list[int] = []
        self.peak = 0.0

    def measurement(self) -> dict[str, float]:
        """The seconds from a call to the next, and the peak of the memory."""
        seconds = steady([after - before for before, after in pairwise(self.calls)])
        return {"seconds": seconds, "peak_mb": self.peak}

    def __call__(
        self, completions: list[str], completion_ids: list[Any], **columns: Any
    ) -> list[float]:
        # else tokenrl evaluates one prompt
        if len(completions) == self.shape.prompts * self.shape.group:
            self.calls.append(time.perf_counter())
            self.tokens.append(sum(map(len, completion_ids)))
            self.peak = max(self.peak, peak_megabytes(self.kind))
            if len(self.calls) == self.steps:
                raise Measured
        rewards = [sum(map(ord, text)) % 7 for text in completions]
        return [float(reward == 0 if self.shape.binary else reward) for reward in rewards]


def peak_megabytes(kind: str) -> float:
    """The most memory so far: of tensors on a GPU, else of the process; on an Apple GPU what it holds now."""
    import torch

    if kind == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    if kind == "mps":
        return torch.mps.driver_allocated_memory() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def make_model(
    shape: Shape, attention: str | None = None, kind: str = "cpu", tokenizer: Any = None
) -> tuple[Any, Any]:
    """A model with random weights, equal for equal arguments, and its tokenizer: of single characters, if none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from toy_tasks.models import character_tokenizer

    if tokenizer is None:
        characters = (chr(c) for c in range(33, sys.maxunicode) if not 0xD800 <= c < 0xE000)
        tokenizer = character_tokenizer(next(characters) for _ in range(shape.vocabulary - 2))
    eos = [tokenizer.eos_token_id, *range(2, shape.ends + 1)]
    config = AutoConfig.for_model(
        shape.architecture,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device(kind):  # a GPU draws the weights of a large model in no time
        return AutoModelForCausalLM.from_config(config, **chosen), tokenizer


def make_prompts(shape: Shape, steps: int) -> list[dict[str, Any]]:
    """Rows of random letters, more than the steps take."""
    draw = random.Random(0)
    count = shape.prompts * (steps + 1)
    return [{"prompt": "".join(draw.choices(LETTERS, k=shape.prompt))} for _ in range(count)]


class Policy(NamedTuple):
    """What is trained: a model, on prompts, in an environment if there is one."""

    model: Any
    tokenizer: Any
    rows: list[dict[str, Any]]
    environment: Any = None


def train(spec: dict[str, Any], clock: Clock, policy: Policy, **settings: Any) -> None:
    """Train with one of the trainers until the clock ends it, without a KL, evaluations, records or checkpoints.

    Args:
        spec: `who` trains, with GRPO; for TRL `bf16`, for tokenrl further `options`.
        clock: the reward function, with the shape of the work, the number of steps and the kind of device.
        policy: what is trained.
        **settings: options that both trainers have.
    """
    trainer = {"trl": train_trl, "tokenrl": train_tokenrl}[spec["who"]]
    settings = {"max_steps": clock.steps, "num_generations": clock.shape.group} | settings
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Measured):
        trainer(spec, clock, policy, output_dir=f"{folder}/run", **settings)


def train_trl(spec: dict[str, Any], clock: Clock, policy: Policy, **settings: Any) -> None:
    import trl
    from datasets import Dataset, disable_progress_bars
    from peft import LoraConfig
    from transformers import PrinterCallback

    disable_progress_bars()
    shape, optional = clock.shape, {}
    if shape.lora_r:
        wide = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        optional["peft_config"] = LoraConfig(r=shape.lora_r, lora_alpha=2 * shape.lora_r, **wide)
    if policy.environment is not None:
        optional["environment_factory"] = policy.environment
    settings |= {
        "per_device_train_batch_size": shape.prompts * shape.group,
        "bf16": spec.get("bf16", False),
        "use_cpu": clock.kind == "cpu",
        "beta": 0.0,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    training = trl.GRPOTrainer(
        model=policy.model,
        reward_funcs=clock,
        args=trl.GRPOConfig(loss_type="grpo", **settings),
        train_dataset=Dataset.from_list(policy.rows),
        processing_class=policy.tokenizer,
        **optional,
    )
    training.remove_callback(PrinterCallback)
    training.train()


def train_tokenrl(spec: dict[str, Any], clock: Clock, policy: Policy, **settings: Any) -> None:
    import tokenrl
    from tokenrl.language import wrap

    wrapped = wrap(policy.model, policy.tokenizer)
    if not clock.shape.ends and policy.environment is None:
        wrapped.eos_ids = ()
    task = tokenrl.PromptTask(
        name="benchmark",
        train_prompts=policy.rows,
        eval_prompts=policy.rows[:1],
        reward=clock,
        environment=policy.environment,
        max_completion_length=clock.shape.length,
    )
    settings |= {
        "estimator": "grpo",
        "prompts_per_step": clock.shape.prompts,
        "lora_r": clock.shape.lora_r,
        "eval_every": 0,
        "eval_generations": 0,
        "log_completions": 0,
        "quiet": True,
        "cpu": clock.kind == "cpu",
    }
    tokenrl.train(model=wrapped, task=task, **settings | spec.get("options", {}))


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure what a dict of JSON asks for; a step more than asked, because steps lie between calls."""
    if spec.get("part") == "device":
        return describe_device(spec)
    if spec["who"] == "tokenrl":
        import tokenrl  # noqa: F401  # before torch
    shape = Shape(**spec["shape"]) if "shape" in spec else SHAPES[spec["work"]]
    clock = Clock(shape, spec["steps"] + 1, device(spec))
    model, tokenizer = make_model(shape, spec.get("attention"), clock.kind)
    # For TRL, an end that is beyond the model's vocabulary costs nothing and is never drawn.
    if spec["who"] == "trl" and not shape.ends:
        tokenizer.add_special_tokens({"eos_token": "<never>"})
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    constant = {"learning_rate": 1e-4, "lr_scheduler_type": "constant"}
    policy = Policy(model, tokenizer, make_prompts(shape, clock.steps))
    train(spec, clock, policy, max_completion_length=shape.length, **constant)
    full = shape.prompts * shape.group * shape.length
    if not shape.ends and set(clock.tokens) != {full}:
        raise SystemExit(f"A step should have {full} tokens, but the steps had {clock.tokens}.")
    return clock.measurement()


def describe_device(spec: dict[str, Any]) -> dict[str, Any]:
    """The device that is measured: its kind and name, and whether it computes in bfloat16."""
    import torch

    kind = device(spec)
    name = f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
    if kind == "cuda":
        name = f"{torch.cuda.get_device_name()}, {torch.version.cuda or torch.version.hip}"
    return {"kind": kind, "name": name, "bf16": kind == "cuda" and torch.cuda.is_bf16_supported()}


def print_measurement(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Print what `measure` returns of the JSON in the last argument."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    print(json.dumps(measure(json.loads(sys.argv[-1]))))


if __name__ == "__main__":
    print_measurement(measure)
