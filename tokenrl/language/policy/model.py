"""A causal language model with its tokenizer, as a token-level policy.

A completion is an episode, a token an action. This module loads the model, decides which ids end a
completion, turns prompts into ids and ids into text, and keeps the reference policy of a KL term.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused
from tokenrl.language.policy.bars import without_bars
from tokenrl.runs.outcome import model_directory

Prompt = str | list[dict[str, Any]]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass
class Policy:
    """A causal LM and what is needed to act with it.

    Attributes:
        model: any `AutoModelForCausalLM`, bare or wrapped by peft; dropout is off.
        tokenizer: its tokenizer; padding side and pad token are never relied upon.
        eos_ids: every id that ends a completion; empty if the model has none.
        pad_id: what fills unused places; always behind an explicit mask, so any id will do.
        context: the longest sequence the model can take, None if it states none.
        source: where the model came from, for the record.
        share_prompt: whether a group may share its prompt's cache; activation checkpointing keeps none.
        reference: a frozen copy for a KL term; None where the adapter can be switched off, or none is needed.
    """

    model: nn.Module
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    context: int | None
    source: str = ""
    share_prompt: bool = True
    reference: nn.Module | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.model.parameters()).device

    @property
    def has_adapter(self) -> bool:
        """Whether the model is wrapped by peft, so that switching the adapter off gives the reference."""
        return hasattr(self.model, "disable_adapter")

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimiser may change."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of one prompt, a string or a list of chat messages.

        Chat messages go through the chat template, which brings its own special tokens: nothing is added
        twice.

        Raises:
            Refused: messages without a chat template, or an empty prompt where the tokenizer has no BOS.
        """
        tokenizer = self.tokenizer
        if isinstance(prompt, str):
            ids = list(tokenizer(prompt).input_ids)
            if ids and ids[-1] in self.eos_ids and not self._ends_with_eos(prompt):
                ids.pop()  # some tokenizers close every text; a closed prompt leaves nothing to complete
        else:
            if not getattr(tokenizer, "chat_template", None):
                raise Refused(
                    "The prompts are chat messages, but the tokenizer of "
                    f"{self.source!r} has no chat template. Give prompts as plain strings, or set "
                    "tokenizer.chat_template."
                )
            last = prompt[-1].get("role") if prompt else None
            ids = list(
                tokenizer.apply_chat_template(
                    prompt,
                    tokenize=True,
                    return_dict=False,
                    add_generation_prompt=last != "assistant",
                    continue_final_message=last == "assistant",
                )
            )
        if not ids:
            if tokenizer.bos_token_id is None:
                raise Refused(
                    "A prompt is empty and the tokenizer has no BOS token to start from. Give the prompt at "
                    "least one token, or set tokenizer.bos_token."
                )
            ids = [tokenizer.bos_token_id]
        return ids

    def _ends_with_eos(self, text: str) -> bool:
        bare = self.tokenizer(text, add_special_tokens=False).input_ids
        return bool(bare) and bare[-1] in self.eos_ids

    def encode_all(
        self,
        prompts: Sequence[Prompt],
        *,
        max_completion_length: int,
        truncate: bool = False,
        first_row: int = 0,
    ) -> list[list[int]]:
        """Ids of many prompts, checked against the context; `truncate` drops tokens from the left.

        `first_row` is the number of the first of them, for the message of a refusal.

        Raises:
            Refused: prompt and completion together exceed the context; the message names row and lengths.
        """
        room = None if self.context is None else self.context - max_completion_length
        if room is not None and room < 1:
            raise Refused(
                f"max_completion_length={max_completion_length} leaves no room for a prompt: the model's "
                f"context is {self.context} tokens. Give at most {(self.context or 0) - 1}."
            )
        encoded = [self.encode(prompt) for prompt in prompts]
        for row, ids in enumerate(encoded):
            if room is None or len(ids) <= room:
                continue
            if not truncate:
                raise Refused(
                    f"The prompt of row {first_row + row} has {len(ids)} tokens; with "
                    f"{max_completion_length} for the completion that is "
                    f"{len(ids) + max_completion_length}, more than the model's context of {self.context}. "
                    "Shorten the prompts, lower max_completion_length, or pass truncate_prompts to drop "
                    "tokens from the left."
                )
            encoded[row] = ids[-room:]
        return encoded

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Texts of completions `ids` [N, T] under `mask` [N, T], without special tokens."""
        rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
        return list(
            self.tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def add_reference(self) -> None:
        """Freeze a copy of the model as the reference of a KL term; with an adapter none is needed."""
        if self.has_adapter or self.reference is not None:
            return
        self.reference = copy.deepcopy(self.model).requires_grad_(False).eval()

    @contextlib.contextmanager
    def reference_model(self) -> Iterator[nn.Module]:
        """The model that this policy started from: a frozen copy, or the base without its adapter."""
        if self.reference is not None:
            yield self.reference
        elif self.has_adapter:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield self.model
        else:
            raise RuntimeError("add_reference() was not called before the first update")


def wrap(model: nn.Module, tokenizer: Any, *, source: str = "") -> Policy:
    """A `Policy` of a model and tokenizer already in memory; every EOS id of either is honoured.

    Raises:
        Refused: the tokenizer knows ids that the model's embedding lacks.
    """
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise Refused(
            f"The tokenizer of {source or 'this model'} has token ids up to {largest}, but the model's "
            f"vocabulary has only {rows} rows. Use the tokenizer that belongs to the model, or resize the "
            "embedding."
        )
    generation = getattr(model, "generation_config", None)
    eos: set[int] = set()
    for value in (
        getattr(generation, "eos_token_id", None),
        getattr(text_config, "eos_token_id", None),
        tokenizer.eos_token_id,
    ):
        if value is not None:
            eos.update([value] if isinstance(value, int) else value)
    pad = next(i for i in (tokenizer.pad_token_id, min(eos, default=None), 0) if i is not None)
    _switch_dropout_off(model)
    return Policy(
        model=model,
        tokenizer=tokenizer,
        eos_ids=tuple(sorted(i for i in eos if 0 <= i < rows)),
        pad_id=pad,
        context=getattr(text_config, "max_position_embeddings", None),
        source=source,
    )


@without_bars()
def load_policy(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
) -> Policy:
    """Load a causal LM and its tokenizer from a local directory or a hub name.

    A directory that holds a peft adapter is loaded with its base and merged, so that a LoRA trained on top
    has the model it started from as its reference.

    Args:
        name_or_path: local directory or hub name; a run directory stands for the model in it.
        dtype: `float32`, `bfloat16`, `float16`, `float64`, or `auto` for what the checkpoint was saved in.
        trust_remote_code: run code shipped with the model; off unless asked for.

    Raises:
        Refused: nothing loadable there, or a tokenizer that does not fit; the loader's own words are quoted.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    name = str(model_directory(name_or_path))
    if dtype not in (*DTYPES, "auto"):
        raise Refused(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}, auto.")
    missing: list[str] = []
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        if find_adapter_config_file(name) is not None:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, **options).merge_and_unload()
            model.requires_grad_(True)
        else:
            loaded: Any = AutoModelForCausalLM.from_pretrained(name, **options, output_loading_info=True)
            model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        hint = "" if trust_remote_code else " (code shipped with a model runs only with trust_remote_code)"
        raise Refused(
            f"No causal language model could be loaded from {name!r}{hint}: {_first_lines(error)} Give a "
            "local directory written by save_pretrained, or a hub name."
        ) from error
    if missing:  # transformers fills them at random, with a warning only
        raise Refused(
            f"{name!r} is no complete causal language model: it lacks {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            + ". A classifier or an encoder cannot be the policy; give a model saved with its language head."
        )
    return wrap(model, tokenizer, source=name)


def enable_gradient_checkpointing(policy: Policy) -> None:
    """Recompute activations in the backward pass: less memory, more time; no prompt's cache is then shared.

    Raises:
        Refused: the architecture does not support it.
    """
    model: Any = policy.model
    # Renamed in transformers 5; the older name stays for its first releases.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise Refused(
            f"gradient_checkpointing cannot be used here: {_first_lines(error)} Leave it off."
        ) from error
    model.enable_input_require_grads()  # with a frozen base nothing else carries gradients through the blocks
    model.train()  # a feature of training mode; every dropout is zero
    policy.share_prompt = False


def _switch_dropout_off(model: nn.Module) -> None:
    """Zero every dropout: a score under other masks than the sample's is not the policy's."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # rates that a forward passes on itself
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
    model.eval()


def _first_lines(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split())
    return (text if len(text) <= limit else text[:limit] + " ...").rstrip(".") + "."
