"""Switches dropout off, because a policy has to be the same when it samples and when it is scored."""

from __future__ import annotations

from torch import nn


def switch_dropout_off(model: nn.Module) -> None:
    """Set every dropout rate to zero.

    With dropout, sampling and scoring would each draw masks of their own, and the log-probabilities that are
    scored would not be those of the distribution that was sampled from.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # rates that the forward pass hands to functions
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
    model.eval()
