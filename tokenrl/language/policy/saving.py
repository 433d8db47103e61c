"""Saving a policy so that plain transformers loads it, written aside and put in place last."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from tokenrl.language.policy.bars import without_bars
from tokenrl.language.policy.model import Policy


@without_bars()
def save_policy(policy: Policy, directory: Path, *, card: str | None = None) -> None:
    """Write model and tokenizer with `save_pretrained`, and a model card.

    An adapter is merged into a copy of the weights, so that `AutoModelForCausalLM` needs nothing else; the
    adapter alone lies in `adapter/`.

    Args:
        policy: the policy.
        directory: an existing folder.
        card: text of README.md, if any.
    """
    model: Any = policy.model
    if policy.has_adapter:
        model.save_pretrained(directory / "adapter")
        policy.tokenizer.save_pretrained(directory / "adapter")  # so that it loads as a model too
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(directory)
    policy.tokenizer.save_pretrained(directory)
    if card is not None:
        (directory / "README.md").write_text(card, encoding="utf-8")


def model_card(title: str, facts: dict[str, Any], *, command: str) -> str:
    """README.md of a trained model: what it is, how it was made, what it reached."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [reinforcement-learning, reinforce, tokenrl]",
        "---",
        f"# {title}",
        "",
        "Trained by policy gradients with tokenrl. Loads in plain transformers:",
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
        "Made by",
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
