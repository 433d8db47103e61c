"""Makes the optimiser of a policy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tokenrl.language.policy.model import Policy
    from tokenrl.language.training.arguments import TrainArguments


def make_optimizer(args: TrainArguments, policy: Policy) -> torch.optim.Optimizer:
    """Return the optimiser that the settings name, of the policy's trainable weights."""
    make: Any = torch.optim.SGD
    weights: Any = policy.trainable_parameters()
    if args.optimizer == "adamw":
        make = partial(torch.optim.AdamW, fused=policy.device.type in ("cpu", "cuda") or None)
    elif args.optimizer == "muon":
        make, weights = Muon, policy.model
    optimizer: torch.optim.Optimizer = make(
        weights, lr=args.learning_rate, weight_decay=args.weight_decay
    )
    return optimizer


class Muon(torch.optim.Muon):
    """Muon for the matrices inside a model, and AdamW at the same rate for its embeddings, head and vectors.

    Attributes:
        others: AdamW.
    """

    def __init__(self, model: Any, **options: Any) -> None:
        """Begin with the weights of a model; the options are `lr` and `weight_decay`."""
        outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        parts: Any = [], []
        for weight in model.parameters():
            parts[weight.ndim == 2 and id(weight) not in outer].append(weight)
        super().__init__(parts[1], **options)
        self.others = torch.optim.AdamW(parts[0], **options)

    def step(self, closure: Any = None) -> Any:
        """Update all weights."""
        self.others.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self.others.step()
        return super().step(closure)

    def state_dict(self) -> Any:
        """Return what a continuation needs."""
        return {**super().state_dict(), "others": self.others.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        """Continue from what `state_dict` returned."""
        self.others.load_state_dict(state["others"])
        super().load_state_dict(state)
