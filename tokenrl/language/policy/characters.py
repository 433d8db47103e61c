"""Counts the characters that a tokenizer loses, and warns of prompts that a model does not read as they stand."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any
from unicodedata import normalize

from tokenrl.errors import with_places
from tokenrl.language.policy.stops import special_tokens

MANY = 512
"""Most rows whose texts are looked at; more take longer and show the same."""


def unknown_characters(tokenizer: Any, texts: Iterable[str], source: str) -> tuple[str, float]:
    """Return in words how many characters a tokenizer loses, with some of them, and the share of these.

    Args:
        tokenizer: the model's tokenizer.
        texts: the texts.
        source: what the texts are, in words.
    """
    before = Counter[str]()
    after = Counter[str]()
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ids = [i for i in ids if i != tokenizer.unk_token_id]
        before += _characters(text, tokenizer)
        after += _characters(tokenizer.decode(ids, clean_up_tokenization_spaces=False), tokenizer)
    lost = before - after
    share = lost.total() / max(1, before.total())
    words = f"{lost.total():,} of {before.total():,} characters of {source}"
    if lost:
        examples = " ".join(repr(character) for character, _ in lost.most_common(5))
        words += f" ({share:.1%}): {examples}"
    return words, share


def _characters(text: str, tokenizer: Any) -> Counter[str]:
    """Count the characters of a text; tokenizers may change spaces, forms and cases without a loss."""
    if getattr(tokenizer, "do_lower_case", False):
        text = text.casefold()
    return Counter("".join(normalize("NFKC", text).split()))


def texts_in(value: Any) -> list[str]:
    """Return the texts of a prompt, a completion or an answer: text, chat messages, or what JSON writes."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list) and all(
        isinstance(turn, dict) and "content" in turn for turn in value
    ):
        return [str(turn["content"] or "") for turn in value]
    return [json.dumps(value, ensure_ascii=False, skipkeys=True, default=str)]


def prompt_warnings(tokenizer: Any, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return warnings about prompts that the model does not read as they stand there.

    The first holds the text of a special token, which the tokenizer reads as the token itself: an `<eos>` in a
    prompt ends it for the model. Special tokens that a chat template writes around messages are not meant. Or
    prompts hold characters that the tokenizer lacks (of the first 512 rows).

    Args:
        tokenizer: the model's tokenizer.
        rows: rows with a `prompt`, text or chat messages, as the user wrote them.
    """
    warnings = []
    names = sorted(special_tokens(tokenizer).values(), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
    placed = () if getattr(tokenizer, "split_special_tokens", False) else with_places(rows)
    for location, row in placed:
        if match := pattern.search(" ".join(texts_in(row["prompt"]))):
            warnings.append(
                f'The prompt of {location} contains "{match[0]}", which the tokenizer reads as a special '
                "token. If it is meant as text, write it differently, as with a space inside."
            )
            break
    texts = [text for row in islice(rows, MANY) for text in texts_in(row["prompt"])]
    words, share = unknown_characters(tokenizer, texts, "prompts")
    if share:
        warnings.append(f"The tokenizer loses {words}. The model does not read them.")
    return warnings
