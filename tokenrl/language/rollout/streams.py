"""Random numbers of sampling: which uniforms belong to which completion, and which streams there are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def uniforms(
    seed: int, step: int, prompts: Sequence[int], *, num_generations: int, max_completion_length: int
) -> Tensor:
    """Uniforms in [0, 1) for one rollout, from a counter-based generator (Philox) keyed by seed and step.

    Args:
        seed: seed of the run.
        step: step of the run.
        prompts: identity of each prompt, e.g. its place in the stream of prompts.
        num_generations: G, rows a prompt.
        max_completion_length: T, columns.

    Returns:
        float64 [B * G, T].
    """
    bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64))
    generator, state = np.random.Generator(bits), bits.state
    table = np.empty((len(prompts), num_generations, max_completion_length))
    for b, prompt in enumerate(prompts):
        for g in range(num_generations):  # a counter of its own: neither G nor T moves anyone's draws
            state["state"]["counter"] = np.array([0, g, prompt, 0], dtype=np.uint64)
            bits.state = state
            generator.random(out=table[b, g])
    return torch.from_numpy(table.reshape(-1, max_completion_length))


STREAMS = {
    "evaluation": 2**63,
    "measurement": 2**62,
    "probe": 2**62 + 2**61,
    "difficulty": 2**61,
    "preferences": 2**60,
}
"""Added to the seed: what is sampled for another purpose than training has random numbers of its own."""
