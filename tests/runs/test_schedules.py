"""Learning rates are those of transformers, in each group of weights."""

import pytest
import torch
from transformers import get_scheduler

from tokenrl.core.schedules import set_rates, share_of_rate


def optimizer():
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (0.1, 0.05)]
    return torch.optim.AdamW(groups)


def rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "length"), [(0, 7), (3, 7), (9, 7), (0, 0)])
def test_the_learning_rates_are_those_of_transformers(kind, warmup, length):
    ours, theirs = optimizer(), optimizer()
    name = "constant_with_warmup" if kind == "constant" else kind
    schedule = get_scheduler(name, theirs, warmup, length)
    for updates in range(9):
        set_rates(ours, share_of_rate(kind, updates, length, warmup))
        assert rates(ours) == rates(theirs)
        theirs.step()
        schedule.step()
