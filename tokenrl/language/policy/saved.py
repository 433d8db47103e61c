"""Holds a policy as checkpoints do, and tries before the first step whether it can be saved.

All but the weights is saved. The names and shapes of the weights are compared with those of the model that
transformers makes of the saved configuration.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, refusing
from tokenrl.language.policy.loading import quietly
from tokenrl.language.policy.saving import (
    AUTO_CLASSES,
    adapter_weights,
    base_of,
    has_adapter,
    merged,
    read_weights,
    save_policy,
    weight_shapes,
    write_adapter,
    write_generation,
)


@dataclass
class SavedModel:
    """A policy or a reward model as checkpoints hold it: all of its weights, or its adapter alone.

    Attributes:
        policy: the policy or the reward model.
        kind: "policy" or "reward model".
        distribution: how tokens are drawn in training, see `save_policy`.
    """

    policy: Any
    kind: str = "policy"
    distribution: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the adapter alone holds all that is trained, so that a checkpoint of it is complete.

        Raises:
            Refused: beside an adapter other weights are trained too.
        """
        model = self.policy.model
        if not has_adapter(model):
            return
        names = model.active_adapters
        if len(names) != 1:
            raise Refused(
                f"The model has {len(names)} active adapters ({', '.join(names)}), and one is trained: "
                "choose it by model.set_adapter."
            )
        of_adapter = {weight.data_ptr() for weight in adapter_weights(model).values()}
        for name, weight in model.named_parameters():
            if weight.requires_grad and weight.data_ptr() not in of_adapter:
                raise Refused(
                    f"The model has an adapter, but weights outside it would be trained too, such as {name}: "
                    "freeze them, or name their modules in peft's modules_to_save."
                )

    @cached_property
    def _base(self) -> dict[str, Any]:
        return base_of(self.policy.model)  # frozen, so once is enough

    def write(self, folder: Path) -> None:
        """Write the weights and the tokenizer into an existing folder, which then loads as a model.

        A folder with an adapter alone loads on top of the base model that the adapter was trained on, and is
        refused where that model is not to be found.
        """
        if has_adapter(self.policy.model):
            with quietly():
                write_adapter(self.policy, folder, self._base)
        else:
            save_policy(self.policy, folder, distribution=self.distribution)

    def read(self, folder: Path) -> None:
        """Give the model the weights that `write` wrote, bit for bit.

        Raises:
            Refused: the folder holds the weights of another model, or of an adapter on another base.
        """
        read_weights(self.policy.model, folder)

    def tensors(self) -> Iterable[Tensor]:
        """Return the weights that are trained."""
        return [p for p in self.policy.model.parameters() if p.requires_grad]

    @quietly()
    def check(self, folder: Path) -> None:
        """Save all but the weights into an empty folder, and compare these with what transformers makes of it.

        Raises:
            Refused: something cannot be saved, or not so that transformers loads the same model.
        """
        import transformers

        model = self.policy.model
        bare = model.get_base_model() if has_adapter(model) else model
        auto = getattr(transformers, AUTO_CLASSES[self.kind])
        has_own_code = "transformers_modules" in str(type(bare))
        options = {"trust_remote_code": has_own_code}
        with refusing(
            "The model of this run cannot be saved and loaded",
            "With its tokenizer it must be what transformers makes of its configuration: set "
            "config.tie_word_embeddings to whether the head shares the embedding's weights, and undo other changes "
            "of layers.",
        ):
            hollow = _hollow(model)
            hollow.config.save_pretrained(folder)
            self.policy.tokenizer.save_pretrained(folder)
            write_generation(self.policy, hollow, folder, self.distribution)
            transformers.AutoTokenizer.from_pretrained(folder, **options)
            if getattr(bare, "hf_quantizer", None) is None:
                config = transformers.AutoConfig.from_pretrained(folder, **options)
                with torch.device("meta"):
                    skeleton = auto.from_config(config, **options)
                # a shared weight counts once
                shapes, loaded = (weight_shapes(x.named_parameters()) for x in (hollow, skeleton))
                wrong = [name for name in shapes | loaded if shapes.get(name) != loaded.get(name)]
                if wrong:
                    names = ", ".join(wrong)[:200]
                    raise ValueError(f"loaded again, its weights differ: {names}")


def _hollow(model: Any) -> Any:
    """Return a copy of a model whose weights have names and shapes alone, with its adapter merged."""
    copies = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    hollow = copy.deepcopy(model, copies)
    return merged(hollow) if has_adapter(model) else hollow
