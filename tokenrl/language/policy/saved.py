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
    KINDS,
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

ROUNDING, COARSE = 0.01, 0.12
"""The largest error of a logit, relative to the largest one, in float32 or better, and in less precision."""
STEP = 0.1
"""How far a trial moves the weights, relative to their size, so that an adapter and ties have an effect."""
WRITTEN = f"{string.printable}naïve café, 漢字 😀"
"""A text that a tokenizer has to read as it did before it was saved."""


@dataclass
class SavedPolicy:
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
        if len(names := model.active_adapters) != 1:
            problem = f"The model has {len(names)} active adapters ({', '.join(names)})"
            raise Refused(f"{problem}, and one is trained: choose it by model.set_adapter.")
        held = {weight.data_ptr() for weight in adapter_weights(model).values()}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if outside := [name for name, p in trained if p.data_ptr() not in held]:
            raise Refused(
                f"The model has an adapter, but {len(outside)} weights outside it would be trained too, "
                f"such as {outside[0]}: freeze them, or name their modules in peft's modules_to_save."
            )

    @cached_property
    def _base(self) -> dict[str, Any]:
        return base_of(self.policy.model)  # frozen, so once is enough

    def write(self, folder: Path) -> None:
        """Write the weights and the tokenizer into an existing folder, which then loads as a model.

        A folder with an adapter alone loads on top of the base model that the adapter was trained on, and is
        refused where that model is not to be found.
        """
        if not has_adapter(self.policy.model):
            save_policy(self.policy, folder)
            return
        with quietly():
            write_adapter(self.policy, folder, self._base)

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
        trial, model = copy.copy(self.policy), self.policy.model
        with _saving("model", "Give one that can be copied, with an adapter that can be merged."):
            trial.model = _moved(model) if _is_small(model) else _hollow(model)
        base = _bare(trial.model)
        mend = "Mend generation_config.json, or model.generation_config: sampling needs do_sample true."
        with _saving("generation settings", mend):
            write_generation(trial, base, folder)
        with _saving("model or tokenizer", "Give what save_pretrained can write."):
            if _is_small(model):
                save_policy(trial, folder)
            else:
                base.config.save_pretrained(folder)
                trial.tokenizer.save_pretrained(folder)
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
        """Load a saved model as plain transformers does, and compare it with the one that was saved."""
        import transformers

        model, auto = policy.model, getattr(transformers, KINDS[self.kind][1])
        options = {
            "trust_remote_code": type(_bare(model)).__module__.startswith("transformers_modules")
        }
        with _saving("tokenizer", "Give one that AutoTokenizer can load from a folder."):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
            if _reading(tokenizer) != _reading(policy.tokenizer):
                raise ValueError("loaded again, it reads a text as other tokens")
        mend = (
            "It must be what transformers makes of its configuration: set config.tie_word_embeddings to "
            "whether the head shares the embedding's weights, and undo other changes of layers or code."
        )
        with _saving("model", mend):
            if _is_small(model):
                loaded, keys = auto.from_pretrained(
                    folder, dtype="auto", output_loading_info=True, **options
                )
                if wrong := [
                    *keys["missing_keys"],
                    *keys["unexpected_keys"],
                    *keys["mismatched_keys"],
                ]:
                    raise ValueError(
                        f"loaded again, its weights differ: {', '.join(map(str, wrong))[:200]}"
                    )
                _compare_logits(model, loaded)
            elif getattr(_bare(model), "hf_quantizer", None) is None:
                config = transformers.AutoConfig.from_pretrained(folder, **options)
                with torch.device("meta"):
                    skeleton = auto.from_config(config, **options)
                _compare_shapes(_hollow(model), skeleton)


@contextmanager
def _saving(part: str, mend: str) -> Iterator[None]:
    """Refuse what cannot be saved or loaded in the block, and say what helps; transformers prints nothing."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except (Refused, Stopped):
        raise
    except Exception as error:  # libraries raise errors of all kinds
        raise Refused(
            f"The {part} of this run cannot be saved and loaded ({describe(error)}). {mend}"
        ) from error
    finally:
        logging.set_verbosity(level)


def _bare(model: Any) -> Any:
    """Return the model itself, without the wrapper of an adapter."""
    return model.get_base_model() if has_adapter(model) else model


def _is_small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) <= LARGE


def _reading(tokenizer: Any) -> tuple[Any, ...]:
    """Return what a tokenizer makes of a text, with its vocabulary and its chat template."""
    template = getattr(tokenizer, "chat_template", None)
    return tokenizer(WRITTEN)["input_ids"], tokenizer.get_vocab(), template


@torch.no_grad()
def _moved(model: nn.Module) -> nn.Module:
    """Return a copy of a model whose trained weights are others, as after some updates."""
    moved = copy.deepcopy(model)
    for weight in (p for p in moved.parameters() if p.requires_grad):
        size = float(weight.float().square().mean().sqrt()) or 1.0
        ramp = torch.arange(weight.numel(), device=weight.device).cos().view_as(weight)
        weight.add_(ramp, alpha=STEP * size)
    return moved


@torch.no_grad()
def _compare_logits(model: nn.Module, loaded: Any) -> None:
    """Compare the logits of a text with tokens from all over the vocabulary."""
    weight = next(model.parameters())
    limit = (
        ROUNDING
        if all(p.dtype in (torch.float32, torch.float64) for p in model.parameters())
        else COARSE
    )
    rows = len(loaded.get_input_embeddings().weight)
    ids = (torch.arange(1, 9, device=weight.device) * rows // 9)[None]
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    ids = ids[:, :context]
    before, after = (
        m.eval()(input_ids=ids).logits for m in (copy.deepcopy(model), loaded.to(weight.device))
    )
    error, size = float((before - after).abs().max()), max(float(before.abs().max()), 0.1)
    if math.isfinite(size) and not error <= limit * size:
        raise ValueError(f"loaded again, its logits are off by {error / size:.2g} of the largest")


def _hollow(model: Any) -> Any:
    """Return a copy of a model whose weights have names and shapes alone, with its adapter merged."""
    weights = {
        id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()
    }
    hollow = copy.deepcopy(model, weights)
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
