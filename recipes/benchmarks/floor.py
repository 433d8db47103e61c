"""Measures the floor of a training step: how long its matrix products alone take on this machine.

Whatever else a trainer does, it multiplies the model's matrices by every token. Of a group the prompt is read
once; each completion is sampled token by token, where every product has as many rows as there are
completions; and the update goes over all tokens again, forwards and backwards. A product of n rows with a
matrix of m weights takes 2 n m operations, and twice as many backwards: m for the gradient of its input, m
for that of the matrix, which an adapter leaves as it is. Attention multiplies each token by those before it.

The seconds are these operations divided by the rate of operations that this machine reaches with matrices of
the same sizes, in float32 or bfloat16, whichever is faster: with few rows for sampling, and many for reading
and the update. `step_against_trl.py` measures it in each of its rounds. By hand:

    python recipes/benchmarks/one_trainer.py '{"who": "floor", "work": "short"}'

It imports torch alone, neither trainer: the threads of its products wait for each other as OpenMP has it.

Look for: the rate with few rows is far below that with many, where the weights come from memory.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["tokenrl-lm[benchmarks]"]
# [tool.uv.sources]
# tokenrl-lm = { path = "../..", editable = true }
# ///

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from one_trainer import Shape

REPEATS = 3
MOST_ROWS = 2048
"""Rows with which the rate of an update is measured; with more it hardly rises."""


def matrices(shape: Shape) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """The sizes of all matrices between embedding and head, and the size of the head: inputs, outputs."""
    wide, inner = shape.hidden, shape.intermediate
    keys = wide // shape.heads * shape.kv_heads
    layer = [(wide, wide)] * 2 + [(wide, keys)] * 2 + [(wide, inner)] * 2 + [(inner, wide)]
    return layer * shape.layers, (wide, shape.vocabulary)


def operations(shape: Shape, length: float) -> tuple[float, float]:
    """Operations of a forward pass over a step: of reading the prompts, and of sampling.

    The last token of a prompt gives the first token of each of its completions, and the last token of a
    completion is not read, so a completion of `length` tokens has one less that passes through the model.
    """
    body, head = matrices(shape)
    weights, head_weights = sum(i * o for i, o in body), head[0] * head[1]
    # of a token with one that it attends to, itself included
    pair = 4 * shape.hidden * shape.layers
    p, tokens = shape.prompt, length - 1
    read = 2 * (p * weights + head_weights) + pair * p * (p + 1) / 2
    sampled = 2 * tokens * (weights + head_weights) + pair * tokens * (2 * p + tokens + 1) / 2
    return shape.prompts * read, shape.prompts * shape.group * sampled


def device() -> str:
    """The kind of device that both trainers take, if they are not told otherwise."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def rate(shape: Shape, rows: int) -> float:
    """Operations per second of products of so many rows with each of the model's matrices."""
    import torch

    kind = device()
    body, head = matrices(shape)
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        # Every layer has matrices of its own: a single layer would stay in the processor's cache.
        weights = [torch.full((o, i), 0.01, dtype=dtype, device=kind) for i, o in (*body, head)]
        inputs = {size: torch.ones(rows, size, dtype=dtype, device=kind) for size, _ in body}
        for _ in range(REPEATS):
            began = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            if kind != "cpu":
                torch.accelerator.synchronize()
            seconds = time.perf_counter() - began
            rates.append(2 * rows * sum(weight.numel() for weight in weights) / seconds)
    return max(rates)


def floor(shape: Shape, length: float) -> dict[str, Any]:
    """The seconds of a step's products, their operations, and the rates with few rows and with many."""
    read, sampled = operations(shape, length)
    update = (2 if shape.lora_r else 3) * (read + sampled)
    completions = shape.prompts * shape.group
    few, many = rate(shape, completions), rate(shape, min(MOST_ROWS, int(completions * length)))
    seconds = sampled / few + (read + update) / many
    return {"floor": seconds, "operations": read + sampled + update, "rates": [few, many]}
