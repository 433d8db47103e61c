"""Holds a policy as checkpoints do, and tries before the first step whether it can be saved.

A model of at most `LARGE` parameters is saved whole and loaded again, and its logits are compared; of a
larger one all but the weights is saved, and the names and shapes of its weights are compared with those of
the model that transformers makes of it. At the end of a run the same is compared with what has been saved.
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
    write_adapter,
    write_generation,
)

MAX_ERROR = 0.01
"""The largest error of a logit, relative to the largest logit, in float32 or better."""
MAX_COARSE_ERROR = 0.12
"""The same where some weights have less precision."""
RELATIVE_MOVE = 0.1
"""How far a trial moves the weights, relative to their size, so that an adapter and ties have an effect."""
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
        trial = copy.copy(self.policy)
        with _trying():
            if _is_small(trial.model):
                trial.model = _moved(trial.model)
                save_policy(trial, folder)
            else:
                trial.model = _hollow(trial.model)
                trial.model.config.save_pretrained(folder)
                trial.tokenizer.save_pretrained(folder)
                write_generation(trial, trial.model, folder)
        self._compare(trial, folder)

    def hand_over(self, folder: Path, card: Card) -> None:
        """Save the model with its card at the end of a run, and compare it with what is loaded.

        Raises:
            Stopped: transformers loads another model.
        """
        save_policy(self.policy, folder, card=card)
        try:
            self._compare(self.policy, folder)
        except Refused as error:
            raise Stopped(str(error)) from error

    @quietly()
    def _compare(self, policy: Any, folder: Path) -> None:
        """Load a saved model as plain transformers does, and compare it with the one that was saved.

        Raises:
            Refused: it cannot be loaded, or is another model.
        """
        import transformers

        model = policy.model
        auto = getattr(transformers, AUTO_CLASSES[self.kind])
        has_own_code = "transformers_modules" in str(type(_bare(model)))
        options = {"trust_remote_code": has_own_code}
        with _trying():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            if _reading(tokenizer) != _reading(policy.tokenizer):
                raise ValueError("loaded again, the tokenizer reads a text as other tokens")
            if _is_small(model):
                loaded = auto.from_pretrained(folder, dtype="auto", **options)
                _compare_shapes(_hollow(model), loaded)
                _compare_logits(model, loaded)
            elif getattr(_bare(model), "hf_quantizer", None) is None:
                config = transformers.AutoConfig.from_pretrained(folder, **options)
                with torch.device("meta"):
                    skeleton = auto.from_config(config, **options)
                _compare_shapes(_hollow(model), skeleton)


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


def _bare(model: Any) -> Any:
    """Return the model itself, without the wrapper of an adapter."""
    return model.get_base_model() if has_adapter(model) else model


def _is_small(model: Any) -> bool:
    return bool(_bare(model).num_parameters() <= LARGE)


def _reading(tokenizer: Any) -> tuple[Any, ...]:
    """Return what a tokenizer makes of a text, with its vocabulary and its chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return tokenizer(SAMPLE)["input_ids"], tokenizer.get_vocab(), template


@torch.no_grad()
def _moved(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose trained weights are others, as after some updates."""
    moved = copy.deepcopy(model)
    for weight in moved.parameters():
        if weight.requires_grad:
            size = float(weight.float().square().mean().sqrt()) or 1.0
            ramp = torch.arange(weight.numel(), device=weight.device).cos()
            weight.add_(ramp.view_as(weight), alpha=RELATIVE_MOVE * size)
    return moved


@torch.no_grad()
def _compare_logits(model: nn.Module, loaded: Any) -> None:
    """Compare the logits of a text with tokens from all over the vocabulary."""
    weights = list(model.parameters())
    rows = len(loaded.get_input_embeddings().weight)
    ids = torch.arange(1, 9, device=weights[0].device)[None] * rows // 9
    before = copy.deepcopy(model).eval()(input_ids=ids).logits
    after = loaded.to(ids.device).eval()(input_ids=ids).logits
    size = max(float(before.abs().max()), 0.1)
    error = float((before - after).abs().max()) / size
    is_coarse = any(weight.dtype.itemsize < 4 for weight in weights)
    limit = MAX_COARSE_ERROR if is_coarse else MAX_ERROR
    if math.isfinite(size) and not error <= limit:
        raise ValueError(f"loaded again, its logits are off by {error:.2g} of the largest")


def _hollow(model: Any) -> Any:
    """Return a copy of a model whose weights have names and shapes alone, with its adapter merged."""
    bare_weights = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    hollow = copy.deepcopy(model, bare_weights)
    return merged(hollow) if has_adapter(model) else hollow


def _compare_shapes(model: nn.Module, skeleton: nn.Module) -> None:
    """Compare names and shapes of weights, of which a shared one is saved once, with those to be loaded."""
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    loaded = {
        name: weight.shape for name, weight in skeleton.named_parameters(remove_duplicate=False)
    }
    names = {**shapes, **dict(skeleton.named_parameters())}
    if wrong := [name for name in names if shapes.get(name) != loaded.get(name)]:
        raise ValueError(f"loaded again, its weights differ: {', '.join(wrong)[:200]}")
