"""Saves a policy so that plain transformers can load it, and writes its model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenrl.language.policy.bars import without_bars
from tokenrl.language.policy.cards import Card
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
        model.save_pretrained(directory / "adapter")
        policy.tokenizer.save_pretrained(directory / "adapter")  # the adapter's folder then loads as a model
        (directory / "adapter" / "README.md").unlink(missing_ok=True)  # peft's template, without content
        if card is not None:
            (directory / "adapter" / "README.md").write_text(card.policy(adapter=True), encoding="utf-8")
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)
    if card is not None:
        (directory / "README.md").write_text(card.policy(), encoding="utf-8")
