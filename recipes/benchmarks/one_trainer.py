"""Measures one trainer on one shape of work, and prints the result as a line of JSON.

`step_against_trl.py` starts this program for each of its measurements, so that the peak of the memory belongs
to that measurement alone; it also holds the shapes of work that are measured. For the floor it measures no
trainer, but matrix products alone (`floor.py`). To repeat one by hand:

    python recipes/benchmarks/one_trainer.py '{"who": "tokenrl", "work": "short", "steps": 4}'
    python recipes/benchmarks/one_trainer.py '{"who": "trl", "work": "short", "steps": 4, "bf16": true}'

The reward function is the clock: both trainers call it once a step, so a step lasts from one call to the next
and includes all that a trainer does. The peak is read at the last of these calls, which ends the training, so
that nothing is saved. With `"cpu": true` both leave a GPU alone.

A process that measures tokenrl imports it before torch, as the command does: it sets a variable that OpenMP
reads when torch is loaded. One that measures TRL, or the floor, does not import it, and leaves OpenMP alone.

Look for: `seconds` fall to a steady level after the first steps; `tokens` are equal where no completion may
end early.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from floor import device, floor

LETTERS = "".join(chr(c) for c in range(33, 127))
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROLES = len("<user><assistant>")  # tokens that the chat template adds


@dataclass(frozen=True)
class Shape:
    """A model and the work of a step; the defaults are a Llama of 1 M parameters."""

    prompts: int = 8
    group: int = 8
    prompt: int = 10  # tokens
    length: int = 32  # tokens of a completion, at most
    ends: int = 0  # how many words of the vocabulary end a completion; 0: none ends early
    binary: bool = False  # rewards of 0 and 1, of which a seventh is 1
    chat: bool = False
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


M135: dict[str, Any] = {
    **{
        "vocabulary": 49_152,
        "layers": 30,
        "hidden": 576,
        "intermediate": 1536,
        "heads": 9,
        "kv_heads": 3,
    },
    **{"prompts": 4, "tied": True},
}
WORK = {
    "fixed": Shape(),
    "long_prompt": Shape(prompt=64),
    "longer_prompt": Shape(group=4, prompt=128, length=64),
    "long": Shape(length=128),
    "short": Shape(prompts=16, length=8),
    "variable": Shape(ends=1),
    "verifiable": Shape(ends=6, binary=True),
    "vocabulary": Shape(length=64, vocabulary=50_000),
    "135m": Shape(**M135),
    "lora": Shape(**M135, prompt=40, length=48, chat=True, lora_r=8),
}
LONG: dict[str, Any] = {"prompts": 8, "prompt": 64, "length": 128}
QWEN: dict[str, Any] = {"vocabulary": 151_936, "kv_heads": 2, "tied": True}
GPU_WORK = {
    "gpu-1m": Shape(**LONG),
    "gpu-135m": Shape(**M135 | LONG),
    "gpu-0.5b": Shape(**QWEN | LONG, layers=24, hidden=896, intermediate=4864, heads=14),
    "gpu-1.5b": Shape(**QWEN | LONG, layers=28, hidden=1536, intermediate=8960, heads=12),
}


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
        self.parameters, self.peak = 0, 0.0

    def __call__(
        self, completions: list[Any], completion_ids: list[Any], **columns: Any
    ) -> list[float]:
        # else tokenrl evaluates one prompt
        if len(completions) == self.shape.prompts * self.shape.group:
            self.calls.append(time.perf_counter())
            self.tokens.append(sum(map(len, completion_ids)))
            self.peak = max(self.peak, peak_megabytes(self.kind))
            if len(self.calls) == self.steps:
                raise Measured
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        rewards = [sum(map(ord, text)) % 7 for text in texts]
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
        tokenizer.chat_template = CHAT if shape.chat else None
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
    import torch

    generator = torch.Generator().manual_seed(0)
    size = (shape.prompts * (steps + 1), shape.prompt - ROLES * shape.chat)
    letters = torch.randint(len(LETTERS), size, generator=generator).tolist()
    texts = ["".join(LETTERS[i] for i in row) for row in letters]
    return [
        {"prompt": [{"role": "user", "content": text}] if shape.chat else text} for text in texts
    ]


def train_with_trl(
    model: Any,
    tokenizer: Any,
    rows: list[dict[str, Any]],
    reward: Any,
    estimator: str = "grpo",
    peft_config: Any = None,
    environment: Any = None,
    **settings: Any,
) -> None:
    """Train with TRL's trainer of an estimator, without a KL, records or checkpoints.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        rows: the prompts.
        reward: the reward function.
        estimator: grpo or rloo.
        peft_config: the adapter to train, if not all weights.
        environment: the class of the environment, if there is one; with grpo only.
        **settings: further options of TRL's configuration.
    """
    import trl
    from datasets import Dataset, disable_progress_bars
    from transformers import PrinterCallback

    disable_progress_bars()
    settings = {"use_cpu": device() == "cpu"} | settings
    settings |= {"beta": 0.0, "gradient_checkpointing": False}
    settings |= {
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    settings |= {"dataloader_pin_memory": False}
    if estimator == "grpo":
        kind, config = trl.GRPOTrainer, trl.GRPOConfig(loss_type="grpo", **settings)
    else:
        kind, config = trl.RLOOTrainer, trl.RLOOConfig(**settings)
    answering = {} if environment is None else {"environment_factory": environment}
    trainer = kind(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        **answering,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def train_trl(shape: Shape, spec: dict[str, Any], clock: Clock, steps: int, folder: str) -> None:
    from peft import LoraConfig

    model, tokenizer = make_model(shape, spec.get("attention"), clock.kind)
    # an end that is beyond the model's vocabulary costs nothing and is never drawn
    if not shape.ends:
        tokenizer.add_special_tokens({"eos_token": "<never>"})
        model.generation_config.eos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
    r, wide = shape.lora_r, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    train_with_trl(
        model,
        tokenizer,
        make_prompts(shape, steps),
        clock,
        spec.get("estimator", "grpo"),
        LoraConfig(r=r, lora_alpha=2 * r, **wide) if r else None,
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=shape.prompts * shape.group,
        num_generations=shape.group,
        max_completion_length=shape.length,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        bf16=spec.get("bf16", False),
        use_cpu=clock.kind == "cpu",
    )


def train_tokenrl(
    shape: Shape, spec: dict[str, Any], clock: Clock, steps: int, folder: str
) -> None:
    from tokenrl.language import wrap

    model, tokenizer = make_model(shape, kind=clock.kind)
    clock.parameters = sum(p.numel() for p in model.parameters())  # before an adapter adds some
    policy = wrap(model, tokenizer)
    if not shape.ends:
        policy.eos_ids = ()
    options = {
        "estimator": spec.get("estimator", "grpo"),
        "learning_rate": 1e-4,
        "lora_r": shape.lora_r,
        "output_dir": f"{folder}/run",
    }
    rows = make_prompts(shape, steps)
    train_with_tokenrl(policy, rows, clock, **options | spec.get("options", {}))


def train_with_tokenrl(
    policy: Any, rows: list[dict[str, Any]], clock: Clock, environment: Any = None, **options: Any
) -> None:
    """Train with tokenrl, without evaluations or records.

    Args:
        policy: the model with its tokenizer.
        rows: the prompts.
        clock: the reward function; it has the shape, the number of steps and the kind of device.
        environment: the class of the environment, if there is one.
        **options: further options of a training.
    """
    import tokenrl

    task = SimpleNamespace(
        name="benchmark",
        train_prompts=rows,
        eval_prompts=rows[:1],
        reward=clock,
        environment=environment,
        max_completion_length=clock.shape.length,
    )
    defaults: dict[str, Any] = {
        "max_steps": clock.steps,
        "prompts_per_step": clock.shape.prompts,
        "num_generations": clock.shape.group,
        "eval_every": 0,
        "eval_generations": 0,
        "log_completions": 0,
        "quiet": True,
        "cpu": clock.kind == "cpu",
    }
    tokenrl.train(model=policy, task=task, **defaults | options)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Measure what a dict of JSON asks for; a step more than asked, because steps lie between calls.

    `sampling` has the seconds of sampling and reward of each step; of tokenrl only.
    """
    shape = Shape(**spec["shape"]) if "shape" in spec else (WORK | GPU_WORK)[spec["work"]]
    if spec["who"] == "floor":
        return floor(shape, spec.get("length") or shape.length)
    if spec["who"] == "tokenrl":
        import tokenrl  # noqa: F401  # before torch
    clock = Clock(shape, spec["steps"] + 1, "cpu" if spec.get("cpu") else device())
    train = {"trl": train_trl, "tokenrl": train_tokenrl}[spec["who"]]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(Measured):
            train(shape, spec, clock, clock.steps, folder)
        timings = Path(folder, "run", "timings.jsonl")
        rows = [json.loads(line) for line in timings.open()] if timings.exists() else []
    full = shape.prompts * shape.group * shape.length
    if not shape.ends and set(clock.tokens) != {full}:
        raise SystemExit(f"A step should have {full} tokens, but the steps had {clock.tokens}.")
    return {
        "seconds": [
            after - before for before, after in zip(clock.calls, clock.calls[1:], strict=False)
        ],
        "sampling": [row["collect"] for row in rows],
        "tokens": clock.tokens,
        "peak_mb": clock.peak,
        "parameters": clock.parameters,
    }


def machine() -> dict[str, Any]:
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"threads": torch.get_num_threads(), "gpu": gpu}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("spec", type=json.loads, help="what to measure, as an object in JSON")
    spec = parser.parse_args().spec
    print(json.dumps(machine() if spec["who"] == "machine" else measure(spec)))
