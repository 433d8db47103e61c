"""Optimisers and schedules go on where they were, bit for bit."""

import copy

import pytest
import torch
from transformers import get_scheduler

from tokenrl.errors import Refused
from tokenrl.runs.optimizers import load_optimizer_state, load_schedule, make_schedule, optimizer_state


def model(sizes=(3, 4)):
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(5, size) for size in sizes))


def fused(layers):
    return torch.optim.AdamW(layers.parameters(), lr=0.1, weight_decay=0.01, fused=True)


def two_groups(layers):
    groups = [{"params": layer.parameters(), "lr": 0.1 / (i + 1)} for i, layer in enumerate(layers)]
    return torch.optim.Adam(groups)


def accelerated(layers):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(fused(layers))


def steps(layers, optimizer, numbers, schedule=None):
    """Updates by gradients of their own; the second layer gets its first one late."""
    rates = []
    for number in numbers:
        torch.manual_seed(number)
        x = torch.randn(2, 5)
        optimizer.zero_grad()
        outputs = [layer(x).square().sum() for layer in (layers if number > 3 else layers[:1])]
        sum(outputs).backward()
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return rates


@pytest.mark.parametrize("make", [fused, two_groups, accelerated])
@pytest.mark.parametrize("at", [0, 2, 5])
def test_moments_counts_and_rates_continue(make, at):
    whole, part = model(), model()
    optimizer = make(whole)
    for group in optimizer.param_groups:
        group["lr"] *= 0.7  # as something outside the schedule may do
    steps(whole, optimizer, range(at))
    saved = copy.deepcopy(optimizer_state(optimizer))
    part.load_state_dict(copy.deepcopy(whole.state_dict()))
    again = make(part)
    load_optimizer_state(again, saved)
    assert steps(whole, optimizer, range(at, 9)) == steps(part, again, range(at, 9))
    assert all(map(torch.equal, whole.parameters(), part.parameters()))


def test_an_optimizer_of_another_model_is_refused():
    layers = model()
    optimizer = fused(layers)
    steps(layers, optimizer, range(5))
    with pytest.raises(Refused, match=r"that of another model .* or start anew"):
        load_optimizer_state(fused(model((3, 4, 4))), optimizer_state(optimizer))


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup, length", [(0, 7), (3, 7), (9, 7), (0, 0)])
def test_the_learning_rates_are_those_of_transformers(kind, warmup, length):
    name = "constant_with_warmup" if kind == "constant" else kind
    here, there = fused(model()), fused(model())
    schedules = make_schedule(kind, here, length, warmup), get_scheduler(name, there, warmup, length)
    for at in (0, 1, 2.5, 3, 5, 7, 9):
        for schedule in schedules:
            load_schedule(schedule, at)
        assert here.param_groups[0]["lr"] == there.param_groups[0]["lr"]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_a_schedule_continues_and_a_longer_one_gives_its_own_rates(kind, recwarn):
    def made(length):
        layers = model()
        optimizer = two_groups(layers)
        return layers, optimizer, make_schedule(kind, optimizer, length, 3)

    for length, at in ((10, 2), (10, 7), (20, 5)):
        layers, optimizer, schedule = made(length)
        expected = steps(layers, optimizer, range(10), schedule)[at:]
        layers, optimizer, schedule = made(10)
        steps(layers, optimizer, range(at), schedule)
        saved = copy.deepcopy(optimizer_state(optimizer)), schedule.last_epoch
        layers, optimizer, schedule = made(length)
        load_optimizer_state(optimizer, saved[0])
        load_schedule(schedule, saved[1])
        assert steps(layers, optimizer, range(at, 10), schedule) == expected
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]
