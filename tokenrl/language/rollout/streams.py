"""The random numbers of sampling: which streams there are, and which uniforms belong to which completion.

Nothing else in the toolkit makes the numbers that tokens are drawn by. Whoever samples names a stream, so
that two purposes with the same seed never share a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tokenrl.language.rollout.sampling import Sampling

STREAMS = {
    "training": 0,
    "interactive": 0,
    "preferences": 2**60,
    "difficulty": 2**61,
    "measurement": 2**62,
    "probe": 2**62 + 2**61,
    "evaluation": 2**63,
    "best_of_n": 2**63 + 2**62,
}
"""What each stream adds to the seed: 2**60 apart or more, so no usual seed leads from one into another.

Training alone has new numbers in each step, which count from 1; all others use those of a step 0, so that two
evaluations of one run are compared on common random numbers. What is sampled for a person to look at has the
step 0 that training never uses.
"""


def uniforms(stream: str, sampling: Sampling, prompts: Sequence[int]) -> Tensor | None:
    """Uniforms in [0, 1) for one call of a generator; each completion has numbers of its own.

    They depend on the stream, the seed, the step (in training), the prompt, the generation and the position
    of the token, and on nothing else: a completion stays the same whatever else is sampled beside it.

    Args:
        stream: a name in `STREAMS`.
        sampling: gives seed, step, G and T.
        prompts: identity of each of B prompts, e.g. its place in the stream of prompts.

    Returns:
        float64 [B * G, T], or None for greedy completions, which need none.

    Raises:
        ValueError: training at step 0, whose numbers belong to another stream.
    """
    if not sampling.num_generations:
        return None
    key = key_of(stream, sampling)
    table = _philox(key, prompts, sampling.num_generations, sampling.max_completion_length)
    return torch.from_numpy(table.reshape(-1, sampling.max_completion_length))


def key_of(stream: str, sampling: Sampling) -> tuple[int, int]:
    """Key of the counter-based generator: the stream's own part of all seeds, and the step in training."""
    if stream == "training" and sampling.step < 1:
        raise ValueError("steps of training count from 1; step 0 belongs to another stream")
    return STREAMS[stream] + sampling.seed, sampling.step if stream == "training" else 0


def _philox(key: tuple[int, int], prompts: Sequence[int], generations: int, length: int) -> np.ndarray:
    """Numbers [B, G, T] of the counter-based generator Philox."""
    bits = np.random.Philox(key=np.array(key, dtype=np.uint64))
    generator, state = np.random.Generator(bits), bits.state
    table = np.empty((len(prompts), generations, length))
    for b, prompt in enumerate(prompts):
        for g in range(generations):  # a counter of its own: neither G nor T moves anyone's draws
            state["state"]["counter"] = np.array([0, g, prompt, 0], dtype=np.uint64)
            bits.state = state
            generator.random(out=table[b, g])
    return table
