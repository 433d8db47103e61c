"""Loads a causal language model with its tokenizer as a policy over tokens, whose episodes are completions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenrl.errors import Refused, refusing
from tokenrl.language.policy.arguments import PromptArguments, saved_form, trained_prompts
from tokenrl.language.policy.copies import frozen_copy, uncompiled
from tokenrl.language.policy.loading import (
    clear_rates,
    context_of,
    find_model,
    loading,
    quietly,
    switch_dropout_off,
)
from tokenrl.language.policy.prompts import (
    CUT,
    Message,
    Prompt,
    checked_form,
    following_ids,
    formed,
    render,
    reply_ids,
    text_ids,
)
from tokenrl.language.policy.saving import base_named, merged, with_adapter
from tokenrl.language.policy.stops import StopStrings, decoded


@dataclass
class Policy:
    """A causal language model as a policy over tokens, with its tokenizer.

    Attributes:
        model: any `AutoModelForCausalLM`, bare or wrapped by peft, with dropout switched off.
        tokenizer: the model's tokenizer, whose padding side and pad token are not relied upon.
        eos_ids: every id that ends a completion; empty if the model has none.
        pad_id: the id that fills unused positions. A mask always hides it, so it may be any id.
        context: the most tokens of a sequence that the model can take; None if there is no limit.
        source, trained_prompts: where the model came from, and hashes of the prompts that it was trained on there.
        reference: frozen model of a KL term, a copy or a teacher; None if none is needed or an adapter gives it.
        form: how the model is asked; `ask` changes it.
        stops: ends completions at the stop strings of the form; None if it has none.
    """

    model: nn.Module
    tokenizer: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    context: int | None
    source: str = ""
    reference: nn.Module | None = field(default=None, repr=False)
    form: PromptArguments = field(default_factory=PromptArguments, repr=False)
    stops: StopStrings | None = field(default=None, repr=False)
    trained_prompts: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @property
    def size(self) -> int:
        """The number of the model's parameters, with those that are not trained."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def has_adapter(self) -> bool:
        """Whether the model is wrapped by peft, so that switching the adapter off gives the reference."""
        return hasattr(self.model, "disable_adapter")

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimiser may change."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def ends(self) -> list[int]:
        """Every id that ends a completion, those that stop strings name too."""
        return sorted({*self.eos_ids, *(self.stops.ids if self.stops else ())})

    def write(self, messages: Any, tools: Any = (), **options: Any) -> str:
        """Return chat messages as the template writes them in the form of `self.form`; see `render`."""
        return render(self.tokenizer, messages, self.form, self.source, tools, **options)

    def encode(self, prompt: Prompt, tools: Any = ()) -> list[int]:
        """Token ids of one prompt, a string or a list of chat messages, in the form of `self.form`.

        Special tokens that the chat template or the text itself has are not added again. A last message of the
        assistant is continued; after any other message a new answer begins.

        Args:
            prompt: the prompt.
            tools: functions, which only a chat can use, or a value of the data, which text ignores; see `read_tools`.

        Raises:
            Refused: template or form do not fit the prompt, or it is text for functions or empty without a BOS.
        """
        tokenizer = self.tokenizer
        prompt = formed(prompt, self.form)
        if isinstance(prompt, str):
            if isinstance(tools, list | tuple) and any(map(callable, tools)):
                raise Refused(
                    f"An environment has tools, but a prompt is text: {prompt!r:.60}. Add chat (--chat) to show them."
                )
            ids = text_ids(tokenizer, prompt)
            if ids and ids[-1] in self.eos_ids:
                bare = tokenizer(prompt, add_special_tokens=False).input_ids
                if ids[-1] not in bare[-1:]:
                    ids.pop()  # some tokenizers end every text with EOS; such a prompt is already finished
        else:
            is_begun = bool(prompt) and prompt[-1].get("role") == "assistant"
            turn = {"add_generation_prompt": not is_begun, "continue_final_message": is_begun}
            text = self.write(prompt, tools, **turn)
            ids = list(tokenizer(text, add_special_tokens=False).input_ids)
        if not ids and tokenizer.bos_token_id is None:
            raise Refused(
                "A prompt is empty, and the tokenizer has no BOS to start from: give it a token, or an "
                "environment whose reset returns a text."
            )
        return ids or [tokenizer.bos_token_id]

    def reply_ids(
        self,
        messages: Sequence[Message],
        *,
        ended: bool,
        chat: bool,
        tools: Any = (),
        before: Sequence[int] = (),
    ) -> list[int]:
        """Token ids to append to a sampled turn, so that the policy reads an answer to it and writes on.

        Args:
            messages: messages of the answer, of the user or of tools.
            ended: whether the sampled turn ended with one of `ends`.
            chat: whether the prompt is chat messages. Text is appended as it stands.
            tools: as in `encode`.
            before: the ids that the answer follows.

        Raises:
            Refused: the chat template cannot continue an episode token by token.
        """
        if not (chat or self.form.chat):
            text = "".join(message["content"] for message in messages)
            ids = following_ids(self, before, text)
            return ids or self.tokenizer.encode(text, add_special_tokens=False)
        ids = reply_ids(self, messages, tools, () if ended else before)
        return ids[1:] if ended and ids[0] in self.ends else ids

    def ask(self, form: PromptArguments) -> None:
        """Ask the model in this form from now on, and end its completions at the stop strings of the form.

        Raises:
            Refused: the model cannot be asked so; the message says why.
        """
        form = checked_form(self.tokenizer, form, self.source)
        if form != self.form:
            self.form = form
            self.stops = StopStrings(self.tokenizer, form.stop) if form.stop else None

    def encode_all(
        self,
        prompts: Sequence[Prompt],
        *,
        max_completion_length: int,
        truncate: bool = False,
        locations: Sequence[str] = (),
        tools: Sequence[Any] = (),
        remedy: str = CUT,
    ) -> list[list[int]]:
        """Token ids of many prompts; each leaves room for a completion in the model's context.

        Args:
            prompts: B prompts, strings or lists of chat messages.
            max_completion_length: the most tokens that a completion may have.
            truncate: drop tokens from the left of a prompt that is too long, instead of refusing it.
            locations: the place of each prompt in the data, for the message of a refusal.
            tools: the tools of each prompt, as in `encode`; empty for none.
            remedy: what helps against a prompt that is too long, for the message.

        Raises:
            Refused: a prompt and its completion could exceed the context, or `encode` refuses a prompt.
        """
        names = [f"of {place}" for place in locations] or [f"{prompt!r:.60}" for prompt in prompts]
        encoded = []
        for row, prompt in enumerate(prompts):
            try:
                encoded.append(self.encode(prompt, tools[row] if tools else ()))
            except Refused as error:
                raise Refused(f"The prompt {names[row]}: {error}") from error
        if self.context is None:
            return encoded
        room = self.context - max_completion_length
        if room < 1:
            raise Refused(
                f"max_completion_length={max_completion_length} leaves no room for a prompt in the model's context "
                f"of {self.context} tokens: lower it (--max-completion-length), or take a model with a longer context."
            )
        for row, ids in enumerate(encoded):
            if len(ids) > room and not truncate:
                shorter = ""
                if len(ids) < self.context:
                    shorter = f"max_completion_length {self.context - len(ids)} or less, give "
                raise Refused(
                    f"The prompt {names[row]} has {len(ids)} tokens, with its completion "
                    f"{len(ids) + max_completion_length}, more than the model's context of {self.context}: "
                    f"give {shorter}{remedy}, or take a model with a longer context."
                )
        return [ids[-room:] for ids in encoded]

    def decode(self, ids: Tensor, mask: Tensor) -> list[str]:
        """Texts of N completions `ids` [N, T] with their `mask` [N, T], cut before the stop string at their end."""
        ids = ids.cpu()
        mask = mask.bool().cpu()
        texts = decoded(self.tokenizer, [ids[i, mask[i]].tolist() for i in range(len(ids))])
        return texts if self.stops is None else [self.stops.cut(text) for text in texts]

    def add_reference(self) -> None:
        """Keep a frozen copy of the model as the reference of a KL term; an adapter makes it needless."""
        if self.reference is None and not self.has_adapter:
            self.reference = frozen_copy(self.model)

    @contextlib.contextmanager
    def reference_model(self) -> Iterator[nn.Module]:
        """Give the reference model: the frozen one, or else this model with its adapter switched off."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield self.model


def wrap(model: nn.Module, tokenizer: Any, *, source: str = "") -> Policy:
    """Make a `Policy` of a model and a tokenizer that are already in memory; dropout is switched off.

    A completion ends at any EOS id that the generation config, the model config or the tokenizer names.

    Args:
        model: a causal language model; of one that `torch.compile` has wrapped, the model inside is taken.
        tokenizer: its tokenizer.
        source: where the model came from, for messages.

    Raises:
        Refused: the tokenizer has ids beyond the rows of the model's embedding.
    """
    model = uncompiled(model)
    text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise Refused(
            f"The tokenizer of {source or 'this model'} has token ids up to {largest}, but the model's "
            f"vocabulary has only {rows} rows: give the tokenizer that belongs to the model."
        )
    ends: list[int | None] = []
    for part in (getattr(model, "generation_config", None), text_config, tokenizer):
        end = getattr(part, "eos_token_id", None)
        ends += [end] if isinstance(end, int | None) else end
    eos_ids = sorted({end for end in ends if end is not None and 0 <= end < rows})
    pad_id = tokenizer.pad_token_id
    if pad_id is None:
        pad_id = min(eos_ids, default=0)
    switch_dropout_off(model)
    policy = Policy(model, tokenizer, tuple(eos_ids), pad_id, context_of(text_config), source)
    return replace(policy, trained_prompts=trained_prompts(source, policy.model.name_or_path))


def load_policy(
    name_or_path: str | Path,
    *,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    merge_adapter: bool = True,
    weights: bool = True,
) -> Policy:
    """Load a causal language model and its tokenizer from a local directory or a hub name.

    An adapter of peft is merged into its base model, which is the reference of an adapter trained on top.

    Args:
        name_or_path: local directory or hub name. The directory of a run means its saved model, asked as there.
        dtype: `float32`, `bfloat16`, `float16`, `float64`, or `auto` for the checkpoint's dtype.
        trust_remote_code: run Python code that is shipped with the model.
        merge_adapter: False leaves an adapter apart from its base, so that it alone can be trained on.
        weights: False loads the shapes of the weights alone, which lie on the device `meta`.

    Raises:
        Refused: model or tokenizer cannot be loaded, or do not fit; an adapter belongs to another base.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    name = find_model(name_or_path)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    with loading("causal language model", name, trust_remote_code=trust_remote_code):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        base = name
        if adapter := find_adapter_config_file(name):
            base, options["revision"] = base_named(name, trust_remote_code)
        whole: Any = AutoModelForCausalLM
        options |= {} if weights else {"device_map": "meta"}
        model, keys = whole.from_pretrained(
            base, **options, ignore_mismatched_sizes=True, output_loading_info=True
        )
        # transformers would draw them
        if missing := ", ".join(
            sorted(map(str, [*keys["missing_keys"], *keys["mismatched_keys"]]))
        ):
            raise Refused(
                f"{base!r} is no whole causal language model: it lacks {missing:.200}, or has it in another size. "
                "Give one with its head, whose weights have the names and sizes of its config.json."
            )
        if adapter:
            model = with_adapter(model, tokenizer, name)
        policy = wrap(model, tokenizer, source=name)
        if adapter and merge_adapter:
            policy.model = merged(model).requires_grad_(True)
    policy.ask(PromptArguments(**saved_form(name_or_path)))
    return policy


def enable_gradient_checkpointing(policy: Policy) -> None:
    """Recompute activations in the backward pass: less memory, more time, and no key/value cache of prompts.

    Raises:
        Refused: the architecture does not support it.
    """
    model: Any = policy.model
    enable = getattr(model, "activation_checkpointing_enable", None)  # not in early transformers 5
    enable = enable or model.gradient_checkpointing_enable
    with refusing("gradient_checkpointing fails", "Leave it off."):
        enable({"use_reentrant": False})
    model.enable_input_require_grads()  # under LoRA the embedding is frozen, and no block would get one
    # Transformers checkpoints only in training mode, in which routers add noise and Falcon reads its rates.
    clear_rates(model.config.get_text_config())
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)


def add_lora(
    policy: Policy,
    *,
    r: int,
    alpha: float | None = None,
    target_modules: Sequence[str] = (),
    seed: int = 0,
) -> None:
    """Wrap the policy's model with a LoRA adapter of rank `r`, in place; only the adapter stays trainable.

    The reference of a KL term is then the model with its adapter switched off.

    Args:
        policy: the policy to adapt.
        r: rank of the update, at least 1.
        alpha: scale of the update (`alpha / r` multiplies it); None means `2 r`.
        target_modules: names of linear layers, such as `q_proj`; empty means every linear layer but the head.
        seed: seed of the adapter's first matrix, which starts at random; the second starts at zero.

    Raises:
        Refused: one of the names fits no linear layer.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    modules = dict(policy.model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
    for name in target_modules:
        if not any(f".{layer}".endswith(f".{name}") for layer in layers):
            names = sorted({layer.rpartition(".")[2] for layer in layers})
            raise Refused(
                f"lora_target_modules, names with spaces between, holds {name!r}, but this model's linear "
                f"layers are: {', '.join(names)}."
            )
    config = LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]  # any number will do
        target_modules=list(target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in modules.values()),
    )
    with torch.random.fork_rng(devices=[]), quietly():
        torch.manual_seed(seed)
        policy.model = get_peft_model(policy.model, config)  # type: ignore[arg-type]
    base = Path(config.base_model_name_or_path or "")
    if config.base_model_name_or_path and base.is_dir():
        config.base_model_name_or_path = str(base.resolve())  # so the adapter finds it anywhere
