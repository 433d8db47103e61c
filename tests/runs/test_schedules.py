"""Learning rates are those of transformers, and go on from any place."""

import pytest
import torch
from transformers import get_scheduler

from tokenrl.runs.schedules import load_schedule, make_schedule


def made(kind, length, warmup, make=make_schedule):
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (0.1, 0.05)]
    optimizer = torch.optim.AdamW(groups)
    if make is get_scheduler:
        kind = "constant_with_warmup" if kind == "constant" else kind
        return optimizer, get_scheduler(kind, optimizer, warmup, length)
    return optimizer, make_schedule(kind, optimizer, length, warmup)


def rates(optimizer, schedule, steps):
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup, length", [(0, 7), (3, 7), (9, 7), (0, 0)])
def test_the_learning_rates_are_those_of_transformers_and_go_on_from_any_place(
    kind, warmup, length, recwarn
):
    whole = rates(*made(kind, length, warmup), 9)
    assert whole == rates(*made(kind, length, warmup, get_scheduler), 9)
    for at in (0, 2, 5):
        optimizer, schedule = made(kind, length, warmup)
        rates(optimizer, schedule, 3)  # wherever it was before
        load_schedule(schedule, at)
        assert rates(optimizer, schedule, 9 - at) == whole[at:]
    (here, ours), (there, theirs) = (
        made(kind, length, warmup),
        made(kind, length, warmup, get_scheduler),
    )
    for schedule in (ours, theirs):
        load_schedule(schedule, 2.5)  # as where the run is measured in samples
    assert here.param_groups[1]["lr"] == there.param_groups[1]["lr"]
    assert not [one for one in recwarn if "lr_scheduler" in str(one.message)]
