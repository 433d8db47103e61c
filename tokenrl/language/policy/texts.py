"""Looks at the text of prompts before it is tokenized: too long for any context, or with special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from tokenrl.errors import Refused

LONG = 100_000
"""Characters of a text below which it is simply tokenized, in a tenth of a second."""


def written_in(prompt: Any) -> Iterator[str]:
    """Yield the texts that a user wrote in a prompt: the text itself, or what chat messages say."""
    if isinstance(prompt, str):
        yield prompt
    elif isinstance(prompt, dict):
        yield from written_in(prompt.get("content", prompt.get("text", "")))
    elif isinstance(prompt, Sequence):
        for part in prompt:
            yield from written_in(part)


def check_characters(tokenizer: Any, prompt: Any, room: int | None, what: str) -> None:
    """Refuse a prompt with so many characters that its tokens cannot fit, without tokenizing it.

    No token has more characters than the longest one of the vocabulary. Tokenizing a text of some million
    characters takes minutes with some tokenizers.

    Args:
        tokenizer: the model's tokenizer.
        prompt: text or chat messages.
        room: the most tokens that it may have; None if there is no limit.
        what: what the message calls the prompt, such as "The prompt of row 3".

    Raises:
        Refused: it has more characters than `room` tokens can have.
    """
    count = sum(map(len, written_in(prompt)))
    if room is None or count <= LONG:
        return
    longest = max(map(len, tokenizer.get_vocab()), default=1)
    if count > longest * room:
        raise Refused(
            f"{what} has {count:,} characters. The longest token of this tokenizer has {longest}, so that is "
            f"more than the {room:,} tokens which the model's context leaves for it. Shorten it."
        )


def special_texts(tokenizer: Any, prompts: Sequence[Any]) -> list[str]:
    """Return a warning if a prompt contains the text of a special token, else an empty list.

    The tokenizer reads such text as the token itself: an `<eos>` in a prompt ends it for the model. Special
    tokens that a chat template writes around messages are not meant.

    Args:
        tokenizer: the model's tokenizer.
        prompts: texts or chat messages, as the user wrote them.
    """
    if getattr(tokenizer, "split_special_tokens", False):
        return []
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {*tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
    found = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if name))
    if not found.pattern:
        return []
    rows = [
        (number, match[0])
        for number, prompt in enumerate(prompts)
        if (match := next(filter(None, map(found.search, written_in(prompt))), None))
    ]
    if not rows:
        return []
    number, name = rows[0]
    others = f" (and {len(rows) - 1:,} more rows contain one)" if rows[1:] else ""
    return [
        f'The prompt of row {number} contains "{name}", which the tokenizer reads as a special token, not as '
        f"these characters{others}. If it is meant as text, write it otherwise, as with a space inside."
    ]
