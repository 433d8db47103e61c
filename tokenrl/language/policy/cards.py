"""Writes the model card, the README.md beside saved weights: what the model is, and how to load it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_MARKS = re.compile(r"[\\`*~$&<|\[\]]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""What Markdown or mathematics in it may read as a mark; an underscore only at the edge of a word."""
_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({model})
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)"""
_LOAD_ADAPTER = """
from peft import PeftModel
model = PeftModel.from_pretrained(model, DIRECTORY)"""
_LOAD_REWARD_MODEL = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(DIRECTORY)
tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)"""


@dataclass(frozen=True)
class Card:
    """What a model card says.

    Attributes:
        title: the heading.
        facts: rows of the table.
        origin: lines of Markdown that say how the run was started.
        base: hub name or directory of the model that training started from; None if it came from neither.
        tags: how the model was trained, as the hub's tags.
    """

    title: str
    facts: Mapping[str, Any]
    origin: Sequence[str]
    base: str | None = None
    tags: Sequence[str] = ("reinforcement-learning", "reinforce")

    def policy(self, *, adapter: bool = False) -> str:
        """Return the card of a trained language model, or that of the adapter alone."""
        if adapter:
            base = "the model that training started from" if self.base is None else f"`{self.base}`"
            about = f"This is the LoRA adapter alone, trained by tokenrl. Load it on top of {base}:"
            model = "BASE_MODEL" if self.base is None else json.dumps(self.base)
            code = _LOAD.format(model=model) + _LOAD_ADAPTER
        else:
            about = "This model was trained by tokenrl. It loads in plain transformers:"
            code = _LOAD.format(model="DIRECTORY")
        tags = [*self.tags, "tokenrl", *(["lora"] if adapter else [])]
        return self._text("peft" if adapter else "transformers", "text-generation", tags, about, code)

    def reward_model(self) -> str:
        """Return the card of a reward model."""
        about = "A reward model: one number for prompt + completion, trained on preferences (Bradley-Terry)."
        tags = ["reward-model", "tokenrl"]
        return self._text("transformers", "text-classification", tags, about, _LOAD_REWARD_MODEL)

    def _text(self, library: str, pipeline: str, tags: Sequence[str], about: str, code: str) -> str:
        lines = [
            "---",
            f"library_name: {library}",
            *([] if self.base is None else [f"base_model: {json.dumps(self.base, ensure_ascii=False)}"]),
            f"pipeline_tag: {pipeline}",
            f"tags: [{', '.join(tags)}]",
            "---",
            *(f"# {_plain(self.title)}", "", about, ""),
            *("```python", code, "```", ""),
            *("| | |", "|---|---|"),
            *(f"| {_plain(name)} | {_plain(value)} |" for name, value in self.facts.items()),
            *("", *self.origin, ""),
        ]
        return "\n".join(lines)


def base_model(model: Any) -> str | None:
    """Return the hub name or directory that was given as a model, or None for an object or nothing."""
    return os.fspath(model) if isinstance(model, str | os.PathLike) else None


def _plain(value: Any) -> str:
    """Write a value on one line so that Markdown shows it as it is, in a table too."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _MARKS.sub(r"\\\g<0>", " ".join(text.splitlines()))
