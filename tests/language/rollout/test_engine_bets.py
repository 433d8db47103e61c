"""Bets on what an engine samples: an honest one is left alone for ever, a lie about the sampler is noticed."""

from __future__ import annotations

import math

import pytest
import torch
from refusals import refused

from tokenrl.language.rollout.agreement import WrongRollout
from tokenrl.language.rollout.engine_checks import CERTAIN, Bets
from tokenrl.language.rollout.rollout import Rollout

ROWS, LENGTH, WORDS = 32, 8, 20


def rows_of(logp, of_sampler, reported, ids, keep=LENGTH):
    """Rows of these tokens [N, T], as an engine reports them and the trainer scores them [N, T, V]."""

    def of_tokens(x):
        return x.gather(2, ids[..., None]).squeeze(2).float()

    mask = torch.arange(LENGTH).expand(len(ids), -1) < keep
    return Rollout(
        prompt_ids=torch.zeros(len(ids), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(ids), 1, dtype=torch.bool),
        prompt_index=torch.arange(len(ids)),
        completion_ids=ids,
        mask=mask,
        sampling_logprobs=of_tokens(reported),
        truncated=mask[:, -1],
        logprobs=of_tokens(logp),
        entropy=-(logp.exp() * logp).sum(2).float(),
    )


def drawn(of_sampler, generator):
    flat = of_sampler.exp().reshape(-1, of_sampler.shape[2])
    return torch.multinomial(flat, 1, generator=generator).view(of_sampler.shape[:2])


def evidence_of(steps, seed, *, sampler=lambda logp, generator: logp, honest=False, spread=2.0):
    """The evidence after each step, until a bet is won; policies are random, and new in each step."""
    generator = torch.Generator().manual_seed(seed)
    bets, evidence = Bets(), []
    for _ in range(steps):
        logits = torch.randn(ROWS, LENGTH, WORDS, generator=generator, dtype=torch.float64)
        logp = (spread * logits).log_softmax(2)
        of_sampler = sampler(logp, generator)
        ids = drawn(of_sampler, generator)
        bets.place(rows_of(logp, of_sampler, of_sampler if honest else logp, ids))
        try:
            evidence.append(bets.settle()["sampling/evidence"])
        except WrongRollout:
            return [*evidence, math.inf]
    return evidence


def tempered(temperature):
    return lambda logp, generator: (logp / temperature).log_softmax(2)


def perturbed(size):
    def sampler(logp, generator):
        noise = torch.randn(logp.shape, generator=generator, dtype=logp.dtype)
        return (logp + size * noise).log_softmax(2)

    return sampler


@pytest.mark.parametrize("spread", [0.3, 8.0])
def test_an_honest_engine_is_left_alone_whatever_its_policy_and_however_often_one_looks(spread):
    """A fair game: of 20 runs about one ever has evidence above log(20), and none comes near the end."""
    most = sorted(max(evidence_of(30, seed, spread=spread)) for seed in range(20))
    assert most[-1] < math.log(1e4) and most[-4] < math.log(20)


def test_an_engine_of_other_numbers_that_reports_them_is_honest_too():
    """Rounded weights, or those of an earlier step: what is off by up to .3 nats per token is weighted."""
    for sampler in (tempered(0.9), perturbed(0.2)):
        most = [max(evidence_of(30, seed, sampler=sampler, honest=True)) for seed in range(6)]
        assert max(most) < math.log(1e3)
    assert not_settled(honest=True)


def not_settled(honest):
    """Whether a step is left out whose reported log-probabilities are far from the trainer's."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(8, LENGTH, WORDS, generator=generator).log_softmax(2)
    other = torch.randn(8, LENGTH, WORDS, generator=generator).log_softmax(2)
    bets = Bets()
    bets.place(rows_of(logp, other, other if honest else logp, drawn(other, generator)))
    return bets.settle() == {} and bets.capital == [0.0] * 4


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [
        (tempered(0.9), 80),
        (tempered(1.1), 80),
        (lambda logp, generator: logp.roll(1, dims=2), 9),
        (lambda logp, generator: logp.masked_fill(logp < -4, -math.inf).log_softmax(2), 120),
        (perturbed(2.0), 40),
    ],
    ids=["colder", "hotter", "other weights", "fewer tokens", "noisy weights"],
)
def test_a_sampler_that_reports_the_numbers_of_the_trainer_is_noticed(sampler, steps):
    for seed in range(2):
        assert evidence_of(steps, seed, sampler=sampler)[-1] == math.inf


def test_the_more_probable_of_two_completions_is_noticed_and_rows_off_the_mask_count_nowhere():
    generator = torch.Generator().manual_seed(0)
    bets, certain = Bets(), False
    for _ in range(80):
        logits = torch.randn(ROWS, LENGTH, WORDS, generator=generator, dtype=torch.float64)
        logp = (2 * logits).log_softmax(2)
        pair = [rows_of(logp, logp, logp, drawn(logp, generator), keep=6) for _ in range(2)]
        sums = torch.stack([(rows.logprobs * rows.mask).sum(1) for rows in pair])
        better = sums.argmax(0)
        ids = torch.stack([rows.completion_ids for rows in pair])[better, torch.arange(ROWS)]
        rows = rows_of(logp, logp, logp, ids, keep=6)
        rows.logprobs[~rows.mask] = -9.0
        bets.place(rows)
        try:
            bets.settle()
        except WrongRollout:
            certain = True
            break
    assert certain


def test_what_settles_it_is_told_with_what_it_may_be():
    bets = Bets()
    bets.capital = [CERTAIN + 2.0, 0.0, 0.0, 0.0]
    assert bets.settle() == {}, "without rows nothing is settled"
    logp = torch.zeros(4, LENGTH, WORDS).log_softmax(2)
    bets.place(rows_of(logp, logp, logp, torch.zeros(4, LENGTH, dtype=torch.long)))
    words = "not drawn from the probabilities that it reports.*other weights, another temperature"
    with refused(words, kind=WrongRollout):
        bets.settle()
