"""Saves a policy so that plain transformers can load it, and writes its model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenrl.language.policy.bars import without_bars
from tokenrl.language.policy.model import Policy


@without_bars()
def save_policy(policy: Policy, directory: Path, *, card: str | None = None) -> None:
    """Write the model and the tokenizer with `save_pretrained`, and the model card.

    An adapter is merged into a copy of the weights, so that `AutoModelForCausalLM` needs nothing else to load
    the model; the adapter alone is written to `adapter/`.

    Args:
        policy: the policy to save.
        directory: an existing folder.
        card: text of README.md; None writes no card.
    """
    model: Any = policy.model
    if policy.has_adapter:
        model.save_pretrained(directory / "adapter")
        policy.tokenizer.save_pretrained(directory / "adapter")  # the adapter's folder then loads as a model
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)
    if card is not None:
        (directory / "README.md").write_text(card, encoding="utf-8")


def model_card(title: str, facts: dict[str, Any], *, command: str) -> str:
    """Text of the README.md of a trained model: how to load it, a table of facts, and the command."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [reinforcement-learning, reinforce, tokenrl]",
        "---",
        f"# {title}",
        "",
        "This model was trained by policy gradients with tokenrl. It loads in plain transformers:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "model = AutoModelForCausalLM.from_pretrained(DIRECTORY)",
        "tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)",
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_cell(value)} |" for name, value in facts.items()),
        "",
        "It was made by this command:",
        "",
        "```",
        command,
        "```",
        "",
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
