"""Random numbers that a seed repeats."""

import torch


def seeded(seed: int) -> torch.Generator:
    """A source of random numbers."""
    return torch.Generator().manual_seed(seed)


def normals(draw: torch.Generator, *shape) -> torch.Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*shape, generator=draw, dtype=torch.double)
