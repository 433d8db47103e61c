"""Makes a reward model from a causal language model: keeps the backbone and gives it a head of one number.

The reward is read at the last token that is not padding, so the tokenizer needs a pad token; if it has none,
its EOS token is used, as in TRL. Adapters (LoRA) are not supported: merge them into the model first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tokenrl.errors import Refused
from tokenrl.language.policy.model import Policy
from tokenrl.language.rewards.model import RewardModel, load_classifier
from tokenrl.settings import check_seed


def reward_backbone(source: Any, *, seed: int = 0) -> RewardModel:
    """Make a trainable reward model.

    If the source has no head, a new one is drawn from N(0, 1 / (hidden + 1)) (Stiennon et al. 2020, arXiv
    2009.01325), so that rewards start near 0 and the predicted probabilities near 1/2.

    Args:
        source: a directory (that of a run means the model that it saved) or hub name of a causal language
            model or of a classifier with one label; a `Policy`; or a pair of such a model and its tokenizer.
            A causal language model in memory is copied; a classifier in memory is used itself.
        seed: seed of a new head.

    Raises:
        Refused: the source cannot be loaded, has another number of labels or an adapter, lacks weights of
            the backbone, or its tokenizer has neither a pad nor an EOS token.
    """
    check_seed(seed)
    if isinstance(source, Policy):
        source = (source.model, source.tokenizer)
    if isinstance(source, tuple):
        (model, tokenizer), missing = source, list[str]()
        if not type(model).__name__.endswith("ForSequenceClassification"):
            model, missing = _from_language_model(model)
    else:
        model, tokenizer, missing = load_classifier(str(source), dtype=torch.float32)
    inside = [name for name in missing if name.startswith(model.base_model_prefix + ".")]
    if inside:
        raise Refused(
            f"{source!s:.100} is not a whole model: it lacks {', '.join(inside[:3])}. Save it whole."
        )
    _draw(model, missing, seed)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise Refused(
            f"The tokenizer of {source!s:.100} has no pad and no EOS token; set tokenizer.pad_token."
        )
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return RewardModel((model.requires_grad_(True), tokenizer))


def _from_language_model(model: nn.Module) -> tuple[Any, list[str]]:
    """Return a classifier with a copy of the model's backbone, and the names of its new weights."""
    from transformers import AutoModelForSequenceClassification

    if hasattr(model, "disable_adapter"):
        raise Refused("The model has an adapter: merge it first (merge_and_unload), or give a saved model.")
    source: Any = model
    config = copy.deepcopy(source.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(source.base_model.state_dict())
    prefix = classifier.base_model_prefix + "."
    names = [name for name, _ in classifier.named_parameters() if not name.startswith(prefix)]
    return classifier.to(source.device, source.dtype), names


@torch.no_grad()
def _draw(model: nn.Module, names: Iterable[str], seed: int) -> None:
    """Draw the weights of a new head, and set its biases to 0."""
    generator, wanted = torch.Generator().manual_seed(seed), set(names)
    for name, weight in model.named_parameters():
        if name in wanted and weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[-1] + 1) ** 0.5)
        elif name in wanted:
            weight.zero_()
