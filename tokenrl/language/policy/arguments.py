"""Arguments that say which model is used, how it is held and how it is asked, as in its run. Imports no torch."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from tokenrl.configuration import UNIQUE_KEYS, read_config
from tokenrl.errors import Refused, read_file, refusing
from tokenrl.files import TRAINED_PROMPTS
from tokenrl.settings import (
    MEASURED,
    OR_OBJECT,
    Natural,
    Positive,
    Seed,
    Settings,
    arguments,
    part_of,
)

T = TypeVar("T")

Dtype = Literal["float32", "bfloat16", "float16", "float64", "auto"]
WRITTEN = {"tool_calls", "reasoning_content", "reasoning", "thinking"}
"""Keys of messages, as transformers names calls and thoughts, that only a chat template can write."""
TINY = "tiny"
"""Name of a new tiny model, where a model to train is named; a directory of this name takes precedence."""


@dataclass(frozen=True)
class PromptArguments(Settings, group="prompts and ends"):
    """How prompts reach the model, and what ends its completions. Default: as in the run that saved it."""

    system_prompt: str | None = None
    """Message of the system that is put before the chat messages of each prompt; rewards do not see it."""
    chat: Annotated[bool, MEASURED] | None = None
    """Send each prompt that is text as a chat message of the user. The rewards of a data set then get
    messages, as if it held them; those of another task get its text."""
    chat_template_kwargs: str | None = None
    """Variables for the model's chat template, in JSON such as '{"enable_thinking": false}'; from Python a
    dict."""
    chat_time: str | None = None
    """The time that a chat template which reads the clock is told, such as 2026-01-31T12:00. Default: the start
    of the run, to the hour, for all of its prompts, also when it continues on another day."""
    stop: tuple[str, ...] | None = None
    """Strings that end a completion: it is finished where one appears in its text, which is cut before it. In
    a shell write $'\\n' for a line break."""

    def __post_init__(self) -> None:
        """Check the values, and hold the variables of the template as JSON."""
        if self.chat_template_kwargs is not None:
            value: Any = self.chat_template_kwargs
            fault = f"chat_template_kwargs was given as {value!r}"
            remedy = """It must be an object in JSON, such as '{"enable_thinking": false}'."""
            with refusing(fault, remedy):
                content = UNIQUE_KEYS.decode(value) if isinstance(value, str) else value
                text = json.dumps(dict(content), ensure_ascii=False, sort_keys=True)
            object.__setattr__(self, "chat_template_kwargs", text)
        super().__post_init__()
        fault = f"chat_time was given as {self.chat_time!r}"
        with refusing(fault, "Write a time as 2026-01-31T12:00, or a day as 2026-01-31."):
            datetime.fromisoformat(self.chat_time or "2000-01-01")
        if "" in (self.stop or ()):
            raise Refused("stop holds '': give texts of one character or more.")

    @property
    def form(self) -> PromptArguments:
        """The part of a command's arguments that says how prompts reach the model."""
        return part_of(self, PromptArguments)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of the chat template."""
        return dict(json.loads(self.chat_template_kwargs or "{}"))


FORM = tuple(field.name for field in fields(PromptArguments))


def run_of(model: Any) -> Path | None:
    """Return the directory of the run that saved a model; None where no run is known, as of a hub name.

    Args:
        model: a directory (of the run, of its `model/` or of a checkpoint), or anything else.
    """
    if not isinstance(model, str | os.PathLike) or not os.path.exists(model):
        return None
    path = Path(model).resolve()
    for run in (path, *path.parents[:2]):
        is_ours = path.relative_to(run).parts[:1] in ((), ("model",), ("checkpoints",))
        if is_ours and (run / "metrics.jsonl").exists() and (run / "config.json").exists():
            return run
    return None


def trained_prompts(*models: Any) -> frozenset[str]:
    """Return the hashes of the prompts that models were trained on, which lie beside their weights.

    Args:
        models: directories with weights; of anything else nothing is known.
    """
    hashes = set[str]()
    for model in models:
        if isinstance(model, str | os.PathLike) and model != "":
            # a run of an earlier version has the file in its own directory
            for folder in filter(None, (Path(model), run_of(model))):
                with suppress(OSError, ValueError):
                    hashes.update(read_file(folder / TRAINED_PROMPTS).decode("ascii").split())
    return frozenset(hashes)


def saved_form(model: Any) -> dict[str, Any]:
    """Return how the run that saved a model asked it: the fields of `PromptArguments` that were set.

    Args:
        model: a directory as `run_of` takes it, or a `Policy`; for anything else nothing is known.
    """
    form: Any = getattr(model, "form", None)
    if (run := run_of(model)) is not None:
        config = read_config(run)
        form = arguments(PromptArguments, {name: config.get(name) for name in FORM})
    return {} if form is None else _set_fields(form)


def _set_fields(form: PromptArguments) -> dict[str, Any]:
    return {name: value for name, value in vars(form).items() if value}


def fill_form(args: T, model: Any = None) -> T:
    """Return settings in which the form of prompts, where it was left open, is as in the run of the model.

    Args:
        args: the arguments of a command.
        model: the model; None for `args.model`.
    """
    values = vars(args)
    form = saved_form(values["model"] if model is None else model)
    left_open = {name: value for name, value in form.items() if values[name] is None}
    return replace(args, **left_open) if left_open else args  # type: ignore[type-var]


def form_line(form: PromptArguments, model: Any = None) -> dict[str, str]:
    """Describe the form as a line of a header, {"asked": ...}; empty if prompts go as they stand.

    Args:
        form: how the model is asked.
        model: the model as it was named, to say where the form comes from if its run was asked so.
    """
    parts = {
        "each text as a message of the user": form.chat,
        f"system prompt {form.system_prompt!r}": form.system_prompt,
        f"chat template with {form.chat_template_kwargs}": form.variables,
        f"chat template at {form.chat_time}": form.chat_time,
        f"completions end at {' or '.join(map(repr, form.stop or ()))}": form.stop,
    }
    words = "; ".join(part for part, is_set in parts.items() if is_set)
    if not words:
        return {}
    is_inherited = saved_form(model) == _set_fields(form)
    return {"asked": f"{words} (as the run of {model})" if is_inherited else words}


@dataclass(frozen=True)
class LoadingArguments(Settings, group="model"):
    """How the model is loaded and how it is held in memory."""

    dtype: Annotated[Dtype, MEASURED] = "float32"
    """Precision of the weights; auto keeps the precision that they were saved in."""
    trust_remote_code: bool = False
    """Run Python code that is shipped with a model. The configuration of a run does not set it."""


@dataclass(frozen=True)
class HoldingArguments(LoadingArguments, group="model"):
    """How the model is made, loaded and held in memory."""

    base_seed: Annotated[Seed, MEASURED] = 0
    """Seed of a tiny model: of a toy task's own with its warm start, and of the one that is named tiny."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which takes less memory and more time."""


@dataclass(frozen=True)
class ModelArguments(HoldingArguments, PromptArguments):
    """Which model is used, and how it is held in memory."""

    model: Annotated[str, OR_OBJECT, MEASURED] | None = None
    """Local directory, hub name, or tiny: half a million random weights, with a token for each character of
    the task's rows, so that it needs demonstrations or a graded reward. Default: the toy task's own tiny
    model, which is warm-started here and cached."""

    def __post_init__(self) -> None:
        """Check the values, and refuse objects that are no model with its tokenizer."""
        super().__post_init__()
        check_model("model", self.model)


def check_model(name: str, model: Any) -> None:
    """Refuse a value of the setting `name` that is neither a name nor a model with its tokenizer."""
    is_policy = hasattr(model, "encode_all")
    if isinstance(model, str | None) or is_policy:
        return
    if isinstance(model, tuple | list) and len(model) == 2:
        causal, tokenizer = model
        if hasattr(causal, "get_input_embeddings") and hasattr(tokenizer, "get_vocab"):
            return
    raise Refused(
        f"{name} was given as a {type(model).__name__}; it must be a directory or hub name, or a model "
        f"with its tokenizer: {name}=(model, tokenizer)."
    )


@dataclass(frozen=True)
class LoraArguments(Settings, group="LoRA"):
    """Low-rank adapters (peft)."""

    lora_r: Natural = 0
    """Rank of a LoRA adapter; 0 trains all weights."""
    lora_alpha: Positive | None = None
    """Scale alpha of the adapter, whose update is multiplied by alpha / rank. Default: twice the rank.
    With 32 at every rank one learning rate served all ranks (`recipes/study`, question 7); with the default a
    lower rank needs a higher one."""
    lora_target_modules: tuple[str, ...] = ()
    """Names of the linear layers to adapt. Default: all of them but the head."""

    def __post_init__(self) -> None:
        """Check the values, and refuse settings of an adapter without an adapter."""
        super().__post_init__()
        for name in ("lora_alpha", "lora_target_modules"):
            value = getattr(self, name)
            if value and not self.lora_r:
                raise Refused(
                    f"{name} was given as {value}, but lora_r is 0: set it to a rank such as 16, or leave "
                    f"{name} out."
                )
