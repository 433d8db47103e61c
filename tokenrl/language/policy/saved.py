"""Holds a policy as checkpoints do, and tries before the first step whether it can be saved.

All but the weights is saved. The names and shapes of the weights are compared with those of the model that
transformers makes of the saved configuration. A model of at most `LARGE` parameters is saved whole and loaded
again, and its logits are compared too. At the end of a run the saved model is compared in the same way.
"""

from __future__ import annotations

import copy
import math
import string
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, Stopped, describe
from tokenrl.language.policy.loading import LARGE, quietly
from tokenrl.language.policy.saving import (
    AUTO_CLASSES,
    Card,
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

MAX_ERROR = 0.01
"""The largest error of a logit, relative to the largest logit, in float32 or better."""
MAX_COARSE_ERROR = 0.12
"""The same where some weights have less precision."""
SAMPLE = f"{string.printable}naïve café, 漢字 😀"
"""A text that a tokenizer has to read as it did before it was saved."""


@dataclass
class SavedModel:
    """A policy or a reward model as checkpoints hold it: all of its weights, or its adapter alone.

    Attributes:
        policy: the policy or the reward model.
        kind: "policy" or "reward model".
    """

    policy: Any
    kind: str = "policy"

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
            save_policy(self.policy, folder)

    def read(self, folder: Path) -> None:
        """Give the model the weights that `write` wrote, bit for bit.

        Raises:
            Refused: the folder holds the weights of another model, or of an adapter on another base.
        """
        read_weights(self.policy.model, folder)

    def tensors(self) -> Iterable[Tensor]:
        """Return the weights that are trained."""
        return [p for p in self.policy.model.parameters() if p.requires_grad]

    def check(self, folder: Path) -> None:
        """Save the model into an empty folder, as a run does at its end, and compare it with what is loaded.

        Raises:
            Refused: something cannot be saved, or not so that transformers loads the same model.
        """
        with _trying():
            if _is_small(self.policy.model):
                save_policy(self.policy, folder)
            else:
                model = _hollow(self.policy.model)
                model.config.save_pretrained(folder)
                self.policy.tokenizer.save_pretrained(folder)
                write_generation(self.policy, model, folder)
        self._compare(folder)

    def hand_over(self, folder: Path, card: Card) -> None:
        """Save the model with its card at the end of a run, and compare it with what is loaded.

        Raises:
            Stopped: transformers loads another model.
        """
        save_policy(self.policy, folder, card=card)
        try:
            self._compare(folder)
        except Refused as error:
            raise Stopped(str(error)) from error

    @quietly()
    def _compare(self, folder: Path) -> None:
        """Load a saved model as plain transformers does, and compare it with the policy's.

        Raises:
            Refused: it cannot be loaded, or is another model.
        """
        import transformers

        model = self.policy.model
        bare = model.get_base_model() if has_adapter(model) else model
        auto = getattr(transformers, AUTO_CLASSES[self.kind])
        has_own_code = "transformers_modules" in str(type(bare))
        options = {"trust_remote_code": has_own_code}
        with _trying():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            if _reading(tokenizer) != _reading(self.policy.tokenizer):
                raise ValueError("loaded again, the tokenizer reads a text as other tokens")
            if getattr(bare, "hf_quantizer", None) is None:
                config = transformers.AutoConfig.from_pretrained(folder, **options)
                with torch.device("meta"):
                    skeleton = auto.from_config(config, **options)
                _compare_shapes(_hollow(model) if has_adapter(model) else model, skeleton)
            if _is_small(model):
                _compare_logits(model, auto.from_pretrained(folder, dtype="auto", **options))


@contextmanager
def _trying() -> Iterator[None]:
    """Refuse what cannot be saved or loaded in the block; transformers prints nothing there.

    Raises:
        Refused: something in the block raised an error; the message quotes it.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (Refused, Stopped):
        raise
    except Exception as error:  # libraries raise errors of all kinds
        raise Refused(
            f"The model of this run cannot be saved and loaded ({describe(error)}). With its tokenizer it must "
            "be what transformers makes of its configuration: set config.tie_word_embeddings to whether the "
            "head shares the embedding's weights, and undo other changes of layers or code."
        ) from error
    finally:
        logging.set_verbosity(level)


def _is_small(model: Any) -> bool:
    return bool(model.num_parameters() <= LARGE)


def _reading(tokenizer: Any) -> tuple[Any, ...]:
    """Return what a tokenizer makes of a text, with its vocabulary and its chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return tokenizer(SAMPLE)["input_ids"], tokenizer.get_vocab(), template


@torch.no_grad()
def _compare_logits(model: Any, loaded: Any) -> None:
    """Compare the logits of a text with tokens from all over the vocabulary."""
    vocabulary = len(loaded.get_input_embeddings().weight)
    ids = torch.arange(1, 9, device=model.device)[None] * vocabulary // 9
    before = model(input_ids=ids).logits
    after = loaded.to(model.device)(input_ids=ids).logits
    largest = max(float(before.abs().max()), 0.1)
    error = float((before - after).abs().max()) / largest
    limit = MAX_COARSE_ERROR if model.dtype.itemsize < 4 else MAX_ERROR
    if math.isfinite(largest) and not error <= limit:
        raise ValueError(f"loaded again, its logits are off by {error:.2g} of the largest")


def _hollow(model: Any) -> Any:
    """Return a copy of a model whose weights have names and shapes alone, with its adapter merged."""
    copies = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    hollow = copy.deepcopy(model, copies)
    return merged(hollow) if has_adapter(model) else hollow


def _compare_shapes(model: nn.Module, skeleton: nn.Module) -> None:
    """Compare the names and shapes of two models' weights; a shared weight counts once."""
    shapes = weight_shapes(model.named_parameters())
    loaded = weight_shapes(skeleton.named_parameters())
    wrong = [name for name in shapes | loaded if shapes.get(name) != loaded.get(name)]
    if wrong:
        raise ValueError(f"loaded again, its weights differ: {', '.join(wrong)[:200]}")
