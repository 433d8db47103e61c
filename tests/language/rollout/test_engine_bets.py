"""Bets on what an engine samples: an honest one is left alone for ever, a lie about the sampler is noticed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tokenrl.language.rollout.agreement import WrongRollout
from tokenrl.language.rollout.engine_checks import Bets

ROWS, LENGTH, WORDS = 32, 8, 20


def drawn(logp, generator):
    return torch.multinomial(logp.exp().view(-1, WORDS), 1, generator=generator).view(ROWS, LENGTH)


def more_probable(logp, generator):
    """Of two completions the more probable one."""
    pair = torch.stack([drawn(logp, generator) for _ in range(2)])  # [2, N, T]
    sums = logp.expand(2, -1, -1, -1).gather(3, pair[..., None]).sum((2, 3))
    return pair[sums.argmax(0), torch.arange(ROWS)]


def evidence_of(seed, lie=lambda logp: logp, steps=30, *, draw=drawn, honest=False, spread=2.0):
    """The evidence after each step, until a bet is won; policies are random, and new in each step."""
    generator = torch.Generator().manual_seed(seed)
    bets, evidence = Bets(), []
    for _ in range(steps):
        logits = torch.randn(ROWS, LENGTH, WORDS, generator=generator, dtype=torch.float64)
        logp = (spread * logits).log_softmax(2)
        sampler = lie(logp).log_softmax(2)
        ids = draw(sampler, generator)[..., None]
        rows = {"logprobs": logp, "sampling_logprobs": sampler if honest else logp}
        rows = {name: x.gather(2, ids).squeeze(2) for name, x in rows.items()}
        rows["logprobs"][:, -1] = -99.0  # off the mask
        mask = torch.arange(LENGTH).expand(ROWS, -1) < LENGTH - 1
        bets.place(SimpleNamespace(**rows, mask=mask, entropy=-(logp.exp() * logp).sum(2)))
        try:
            evidence += [bets.settle().get("sampling/evidence")]
        except WrongRollout:
            return [*evidence, math.inf]
    return evidence


@pytest.mark.parametrize("spread", [0.3, 8.0])
def test_an_honest_engine_is_left_alone_whatever_its_policy_and_however_often_one_looks(spread):
    """A fair game: of 20 runs about one ever has evidence above log(20), and none comes near the end."""
    most = sorted(max(evidence_of(seed, spread=spread)) for seed in range(20))
    assert most[-1] < math.log(1e4) and most[-4] < math.log(20)


def test_an_engine_of_other_numbers_that_reports_them_is_honest_and_one_far_away_is_not_bet_on():
    most = [max(evidence_of(seed, lambda logp: logp / 0.9, honest=True)) for seed in range(9)]
    assert max(most) < math.log(1e3)
    assert evidence_of(0, lambda logp: logp.roll(1, dims=2), 2, honest=True) == [None] * 2


@pytest.mark.parametrize(
    ("lie", "draw"),
    [
        (lambda logp: logp / 0.9, drawn),
        (lambda logp: logp / 1.1, drawn),
        (lambda logp: logp.roll(1, dims=2), drawn),
        (lambda logp: logp.masked_fill(logp < -4, -math.inf), drawn),
        (lambda logp: logp, more_probable),
    ],
    ids=["colder", "hotter", "other weights", "fewer tokens", "better of two"],
)
def test_a_sampler_that_reports_the_numbers_of_the_trainer_is_noticed(lie, draw):
    for seed in range(2):
        assert evidence_of(seed, lie, 120, draw=draw)[-1] == math.inf
