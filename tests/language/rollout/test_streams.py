"""Random-number streams: none shares a number with another, and whoever samples names one."""

import itertools

import pytest

from tokenrl.language.rollout.sampling import STREAMS, Sampling, key_of


def test_streams_are_far_apart_and_training_leaves_step_0_to_the_one_beside_it():
    for first, second in itertools.combinations(STREAMS, 2):
        if {first, second} != {"training", "interactive"}:
            # Around the circle of 64 bits, for the sum of seed and offset may come near its end.
            distance = (STREAMS[first] - STREAMS[second]) % 2**64
            assert min(distance, 2**64 - distance) >= 2**60, (first, second)
    steps = [Sampling(1, seed=seed, step=step) for seed in (0, 1, 2**33) for step in (1, 2, 10**9)]
    training, beside = (
        {tuple(key_of(name, each)) for each in steps} for name in ("training", "interactive")
    )
    assert training.isdisjoint(beside)
    with pytest.raises(ValueError, match="count from 1"):
        key_of("training", Sampling(1))
