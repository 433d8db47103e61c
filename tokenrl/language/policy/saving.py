"""Saves a policy so that plain transformers can load it, writes its model card, and reads weights back."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenrl.errors import Refused, describe
from tokenrl.language.policy.adapters import check_adapter, read_adapter, write_adapter
from tokenrl.language.policy.bars import without_bars
from tokenrl.language.policy.cards import Card
from tokenrl.language.policy.fingerprints import base_of
from tokenrl.language.policy.model import Policy


@without_bars()
def save_policy(policy: Policy, directory: Path, *, card: Card | None = None) -> None:
    """Write the model and the tokenizer with `save_pretrained`, and the model card.

    An adapter is merged into a copy of the weights, so that `AutoModelForCausalLM` needs nothing else to load
    the model; the adapter alone is written to `adapter/`.

    Args:
        policy: the policy to save.
        directory: an existing folder.
        card: what README.md says, in the folder of the adapter too; None writes no card.
    """
    model: Any = policy.model
    if policy.has_adapter:
        write_adapter(policy, directory / "adapter", base_of(model))
        if card is not None:
            (directory / "adapter" / "README.md").write_text(card.policy(adapter=True), encoding="utf-8")
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)
    if card is not None:
        (directory / "README.md").write_text(card.policy(), encoding="utf-8")


@dataclass
class SavedPolicy:
    """A policy as checkpoints hold it: all of its weights, or its adapter alone.

    Attributes:
        policy: the policy.
    """

    policy: Policy
    _base: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check that what is trained can be held.

        Raises:
            Refused: beside an adapter other weights are trained too.
        """
        if self.policy.has_adapter:
            check_adapter(self.policy)

    def write(self, folder: Path) -> None:
        """Write the weights and the tokenizer into an existing folder, which then loads as a model.

        A folder with an adapter alone loads on top of the base model that the adapter was trained on, and is
        refused where that model is not to be found.
        """
        if not self.policy.has_adapter:
            save_policy(self.policy, folder)
            return
        self._base = self._base or base_of(self.policy.model)  # frozen, so once is enough
        with without_bars():
            write_adapter(self.policy, folder, self._base)

    def read(self, folder: Path) -> None:
        """Give the policy the weights that `write` wrote, bit for bit.

        Raises:
            Refused: the folder holds the weights of another model, or of an adapter on another base.
        """
        if self.policy.has_adapter:
            read_adapter(self.policy, folder)
        else:
            read_weights(self.policy.model, folder)

    def tensors(self) -> Iterable[Tensor]:
        """Return the weights that are trained."""
        return self.policy.trainable_parameters()


@without_bars()
def read_weights(model: Any, folder: Path) -> None:
    """Give a model the weights that its `save_pretrained` wrote, bit for bit.

    Transformers reads them, since the names on the disk may differ from those of the model, as of experts.

    Args:
        model: a model of transformers, of the same class and shape as the saved one.
        folder: a local folder.

    Raises:
        Refused: the weights cannot be read, or are those of another model.
    """
    # The widest precision of the model holds each of its weights without rounding.
    kinds = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    dtype = reduce(torch.promote_types, kinds)
    config = copy.deepcopy(model.config)  # that of the folder could be of any size
    try:
        with torch.random.fork_rng(devices=[]):  # some classes draw weights before they load them
            saved, found = type(model).from_pretrained(
                folder, config=config, dtype=dtype, output_loading_info=True, local_files_only=True
            )
        if wrong := [*found["missing_keys"], *found["mismatched_keys"], *found["unexpected_keys"]]:
            raise ValueError(f"the names or the shapes of {len(wrong)} weights differ, such as {wrong[0]}")
        model.load_state_dict(saved.state_dict())
    except Exception as error:  # configuration and weights raise many kinds of errors
        raise Refused(
            f"The weights in {folder} are not those of this run's model ({describe(error)}). Resume with the "
            "model and the settings that the run was started with, or start a new run from these weights "
            "with --model."
        ) from error
