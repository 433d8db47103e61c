"""Ends completions at stop strings: finds the token that completes one, and cuts the text before it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tokenrl.errors import Refused

DECODING: dict[str, Any] = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
"""Arguments of `batch_decode`: the text of a completion as the model wrote it, without special tokens."""
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
MARGIN = 8
"""Characters that the decoded end of a text may lack at its own ends: a space that the tokenizer strips, and
parts of a character whose bytes are several tokens."""


@functools.lru_cache(maxsize=8)
def markers(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens by id, without those of a role such as BOS or padding.

    They may mean something, as `<think>` does, and decoded text leaves them out all the same.
    """
    roles = {getattr(tokenizer, f"{role}_token", None) for role in ROLES}
    added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {i: name for i, name in added.items() if name not in roles}


class StopStrings:
    """Strings that end a completion, as a tokenizer writes them.

    A completion ends with the first token after which its text holds one of the strings, which a token may
    complete in its middle. Whether it has ended depends on its own tokens alone, so the end is part of the
    environment and the gradient is that of the tokens up to there. The name of a special token, which decoded
    text leaves out, ends a completion as EOS does.
    """

    def __init__(self, tokenizer: Any, strings: Iterable[str]) -> None:
        """Find the tokens that can complete one of the strings.

        Raises:
            Refused: a string holds the name of a special token and other text.
        """
        self._tokenizer = tokenizer
        special = {
            str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        strings = list(strings)
        for string in strings:
            inside = [name for name in special if name in string and name != string]
            if inside:
                raise Refused(
                    f"stop holds {string!r}, but {inside[0]!r} is a special token, which the text of a "
                    f"completion leaves out. Give {inside[0]!r} alone, or a string without it."
                )
        self.ids = {special[string] for string in strings if string in special}
        self.strings = [string for string in strings if string not in special]
        self._longest = max(map(len, self.strings), default=0)
        token_ids = sorted(tokenizer.get_vocab().values())
        # Twice, as some tokenizers strip a space in front; a part of a character decodes to U+FFFD.
        texts = self._decode([[i, i] for i in token_ids])
        last = {string[-1] for string in self.strings} | ({"\ufffd"} if self.strings else set())
        self._may_end = torch.zeros(token_ids[-1] + 1, dtype=torch.bool)
        self._may_end[token_ids] = torch.tensor(
            [
                i in self.ids or not last.isdisjoint(text)
                for i, text in zip(token_ids, texts, strict=True)
            ]
        )

    def ended(self, ids: Tensor, rows: Tensor, t: int) -> Tensor:
        """Return which rows end with the token at position t.

        Args:
            ids: ids of N completions, on the CPU [N, T].
            rows: the rows that have not ended before t [n].
            t: the position.

        Returns:
            Booleans [n].
        """
        token = ids[rows, t].clamp(
            max=len(self._may_end) - 1
        )  # a model may have more ids than its tokenizer
        ended = self._may_end[token]
        texts = ids[rows[ended], : t + 1].tolist()
        ended[ended.clone()] = torch.tensor([self._completes(row) for row in texts]).bool()
        return ended

    def end(self, ids: Tensor, lengths: Tensor, finished: Tensor) -> None:
        """End completions at their first stop string, which an engine may have noticed later.

        Args:
            ids: ids of N completions, on the CPU [N, T].
            lengths: their numbers of tokens, changed in place [N].
            finished: True for those that have ended, changed in place [N].
        """
        alive = torch.arange(len(ids))
        for t in range(ids.shape[1]):
            alive = alive[lengths[alive] > t]
            ended = self.ended(ids, alive, t)
            lengths[alive[ended]], finished[alive[ended]] = t + 1, True

    def cut(self, text: str) -> str:
        """Return the text before the first stop string in it; all of it if there is none."""
        starts = [start for string in self.strings if (start := text.find(string)) >= 0]
        return text[: min(starts)] if starts else text

    def _completes(self, ids: Sequence[int]) -> bool:
        """Return whether the last token completes a string, from as few tokens before it as show that."""
        if ids[-1] in self.ids:
            return True
        width = self._longest + MARGIN
        if width < len(ids):
            before, text = self._decode([ids[-width - 1 : -1], ids[-width - 1 :]])
            # Part of a character may spoil bytes beside it, so those are decoded with all before them.
            if len(before) >= width and "\ufffd" not in text[MARGIN:] and self.cut(text) == text:
                return False
        (text,) = self._decode([ids])
        return self.cut(text) != text

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return decoded(self._tokenizer, rows)


def decoded(tokenizer: Any, rows: Sequence[Sequence[int]], **changes: Any) -> list[str]:
    """Return the texts of rows of ids; ids of the model that are none of the tokenizer's have no text.

    Args:
        tokenizer: the tokenizer.
        rows: N rows of ids.
        **changes: arguments of `batch_decode` that differ from `DECODING`.
    """
    try:
        return list(tokenizer.batch_decode(rows, **DECODING | changes))
    except Exception:  # tokenizers written in Python fail on such ids, each in a way of its own
        held = set(tokenizer.get_vocab().values())
        rows = [[i for i in row if i in held] for row in rows]
        return list(tokenizer.batch_decode(rows, **DECODING | changes))
