"""Finds the bytes that each token of a tokenizer writes, and checks them against what the tokenizer decodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from tokenrl.errors import Refused
from tokenrl.language.policy.stops import decoded, special_tokens

VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(256 + k): b for k, b in enumerate(HIDDEN)}
"""The characters by which byte-level BPE names bytes: those that are visible in Latin-1, or else from 256 on."""


def _byte_level(token: str) -> bytes:
    return bytes(BYTES.get(character, 0) for character in token)


def _sentencepiece(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


KINDS: tuple[Callable[[str], bytes], ...] = (_byte_level, _sentencepiece, str.encode)
"""How a token's name tells its bytes, by kind of tokenizer."""


@lru_cache(maxsize=8)
def token_bytes(tokenizer: Any) -> Mapping[int, tuple[bytes, bytes]]:
    """Return what each token writes at the beginning of a completion, and what it writes behind another token.

    The first lacks a space where decoding strips it. Special tokens are left out, as are the few others whose
    text is not the same everywhere.

    Raises:
        Refused: the text of a completion is not what its tokens write one behind the other.
    """
    special = {*special_tokens(tokenizer), *tokenizer.all_special_ids}
    names = {i: name for name, i in tokenizer.get_vocab().items() if i not in special}
    alone, twice = (decoded(tokenizer, [[i] * count for i in names]) for count in (1, 2))
    written = {}
    for (i, name), text, both in zip(names.items(), alone, twice, strict=True):
        for kind in KINDS:
            later = kind(name)
            first = later if later.decode(errors="replace") == text else text.encode()
            if later and (first + later).decode(errors="replace") == both:
                written[i] = first, later
                break
    if 2 * len(written) > len(names):
        return written
    raise Refused(
        "the tokenizer writes other texts than its tokens one behind the other, as one does that puts spaces "
        "between words: for a regular expression or a JSON schema take a model with a tokenizer of bytes (as "
        "GPT-2's), of sentencepiece or of plain characters, or give choices."
    )
