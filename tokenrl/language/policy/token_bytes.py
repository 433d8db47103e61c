"""Finds the bytes that each token of a tokenizer writes, and checks them against what the tokenizer decodes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from tokenrl.errors import Refused
from tokenrl.language.policy.stops import decoded, special_tokens

VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [byte for byte in range(256) if byte not in VISIBLE]
BYTES = {chr(byte): byte for byte in VISIBLE} | {chr(256 + k): b for k, b in enumerate(HIDDEN)}
"""The characters by which byte-level BPE names bytes: those that are visible in Latin-1, or else from 256 on."""
ROWS, LENGTH = 256, 8
"""How many sequences of tokens are decoded to check the bytes, and how many tokens each has."""


def _byte_level(token: str) -> bytes:
    return bytes(map(BYTES.__getitem__, token)) if BYTES.keys() >= {*token} else token.encode()


def _sentencepiece(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


KINDS: tuple[Callable[[str], bytes], ...] = (_byte_level, _sentencepiece, str.encode)
"""How a token's name tells its bytes, by kind of tokenizer."""


def _text(data: bytes) -> str:
    return data.decode(errors="replace")


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
    alone = decoded(tokenizer, [[i] for i in names])
    twice = decoded(tokenizer, [[i, i] for i in names])
    best: dict[int, tuple[bytes, bytes]] = {}
    for kind in KINDS:
        written = {}
        for (i, name), text, both in zip(names.items(), alone, twice, strict=True):
            later = kind(name)
            first = later if _text(later) == text else text.encode()
            if later and _text(first + later) == both:
                written[i] = first, later
        best = max(best, written, key=len)
    if 2 * len(best) > len(names):
        rows = np.random.default_rng(0).choice([*best], (ROWS, LENGTH)).tolist()
        joined = [_joined(best, row) for row in rows]
        pairs = zip(joined, decoded(tokenizer, rows), strict=True)
        if all("\ufffd" in text or text == read for text, read in pairs):
            return best
    raise Refused(
        "The tokenizer writes other texts than its tokens one behind the other, as one does that puts spaces "
        "between words: for a regular expression or a JSON schema take a model with a tokenizer of bytes (as "
        "GPT-2's), of sentencepiece or of plain characters, or give choices."
    )


def _joined(written: Mapping[int, tuple[bytes, bytes]], row: list[int]) -> str:
    """Return the text of a row of ids."""
    return _text(written[row[0]][0] + b"".join(written[i][1] for i in row[1:]))
