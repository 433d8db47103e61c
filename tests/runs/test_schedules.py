"""Learning rates are those of transformers, and go on from any place."""

import pytest
import torch
from transformers import get_scheduler

from tokenrl.runs.schedules import load_schedule, make_schedule


def optimizer_with(make, kind, length, warmup):
    """An optimiser of two groups of weights, and its schedule."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (0.1, 0.05)]
    optimizer = torch.optim.AdamW(groups)
    return optimizer, make(kind, optimizer, length, warmup)


def scheduler_of_transformers(kind, optimizer, length, warmup):
    kind = "constant_with_warmup" if kind == "constant" else kind
    return get_scheduler(kind, optimizer, warmup, length)


def rates(optimizer, schedule, steps):
    rows = []
    for _ in range(steps):
        rows.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rows


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "length"), [(0, 7), (3, 7), (9, 7), (0, 0)])
def test_the_learning_rates_are_those_of_transformers_and_go_on_from_any_step(
    kind, warmup, length, recwarn
):
    whole = rates(*optimizer_with(make_schedule, kind, length, warmup), 9)
    theirs = optimizer_with(scheduler_of_transformers, kind, length, warmup)
    assert whole == rates(*theirs, 9)
    for step in (0, 2, 5):
        optimizer, schedule = optimizer_with(make_schedule, kind, length, warmup)
        rates(optimizer, schedule, 3)  # wherever it was before
        load_schedule(schedule, step)
        assert rates(optimizer, schedule, 9 - step) == whole[step:]
    assert not [warning for warning in recwarn if "lr_scheduler" in str(warning.message)]
