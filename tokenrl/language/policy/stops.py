"""Ends completions at stop strings: finds the token that completes one, and cuts the text before it."""

from __future__ import annotations

import functools
import re
from bisect import bisect_right
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


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Return the texts of a tokenizer's special tokens by their ids."""
    added = tokenizer.added_tokens_decoder
    return {i: str(token) for i, token in added.items() if token.special}


@functools.lru_cache(maxsize=8)
def markers(tokenizer: Any) -> dict[int, str]:
    """Return the special tokens by id, without those of a role such as BOS or padding.

    They may mean something, as `<think>` does, although decoded text leaves them out.
    """
    roles = {getattr(tokenizer, f"{role}_token", None) for role in ROLES}
    special = special_tokens(tokenizer)
    return {i: name for i, name in special.items() if name not in roles}


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
        self.ids: set[int] = set()
        self.strings: list[str] = []
        special = {name: i for i, name in special_tokens(tokenizer).items()}
        for string in strings:
            if string in special:
                self.ids.add(special[string])
                continue
            self.strings.append(string)
            for name in special:
                if name in string:
                    raise Refused(
                        f"stop holds {string!r}, but {name!r} is a special token, which the text of a "
                        f"completion leaves out. Give {name!r} alone, or a string without it."
                    )
        self._pattern = re.compile("|".join(map(re.escape, self.strings)) or "(?!)")
        self._may_end = self._tokens_that_may_end()

    def _tokens_that_may_end(self) -> Tensor:
        """Return for each id whether its token can complete one of the strings [V]."""
        ids = sorted(self._tokenizer.get_vocab().values())
        last = {string[-1] for string in self.strings}
        if last:
            last.add("\ufffd")  # a part of a character
        may_end = torch.zeros(ids[-1] + 1, dtype=torch.bool)
        # Each token stands there twice, as some tokenizers strip a space in front of a text.
        texts = decoded(self._tokenizer, [[i, i] for i in ids])
        for i, text in zip(ids, texts, strict=True):
            may_end[i] = i in self.ids or not last.isdisjoint(text)
        return may_end

    def ended(self, ids: Tensor, rows: Tensor, t: int) -> Tensor:
        """Return which rows end with the token at position t.

        Args:
            ids: ids of N completions, on the CPU [N, T].
            rows: the rows that have not ended before t [n].
            t: the position.

        Returns:
            Booleans [n].
        """
        largest = len(self._may_end) - 1  # a model may have more ids than its tokenizer
        ended = self._may_end[ids[rows, t].clamp(max=largest)]
        tokens = ids[rows[ended], : t + 1].tolist()
        completes = [self._completes(row) for row in tokens]
        ended[ended.clone()] = torch.tensor(completes, dtype=torch.bool)
        return ended

    def _completes(self, ids: Sequence[int]) -> bool:
        """Return whether the last token completes a string, from as few tokens before it as show that."""
        if ids[-1] in self.ids:
            return True
        width = max(map(len, self.strings), default=0) + MARGIN
        if width < len(ids):
            tail = ids[-width - 1 :]
            before, text = decoded(self._tokenizer, [tail[:-1], tail])
            # Part of a character may spoil bytes beside it, so those are decoded with all before them.
            is_whole = len(before) >= width and "\ufffd" not in text[MARGIN:]
            if is_whole and self.cut(text) == text:
                return False
        (text,) = decoded(self._tokenizer, [ids])
        return self.cut(text) != text

    def end(self, ids: Tensor, lengths: Tensor, finished: Tensor, start: int = 0) -> None:
        """End completions at their first stop string, which an engine may have noticed later.

        Args:
            ids: ids of N completions, on the CPU [N, T].
            lengths: their numbers of tokens, changed in place [N].
            finished: True for those that have ended, changed in place [N].
            start: position of the first token that was not looked at before.
        """
        alive = torch.arange(len(ids))
        for t in range(start, ids.shape[1]):
            alive = alive[lengths[alive] > t]
            ended = alive[self.ended(ids, alive, t)]
            lengths[ended] = t + 1
            finished[ended] = True

    def cut(self, text: str) -> str:
        """Return the text before the first stop string in it; all of it if there is none."""
        return self._pattern.split(text, maxsplit=1)[0]


def decoded(tokenizer: Any, rows: Sequence[Sequence[int]], **changes: Any) -> list[str]:
    """Return the texts of rows of ids; an id that the tokenizer lacks has no text.

    Args:
        tokenizer: the tokenizer.
        rows: N rows of ids.
        **changes: arguments of `batch_decode` that differ from `DECODING`.
    """
    try:
        return list(tokenizer.batch_decode(rows, **DECODING | changes))
    except Exception:  # tokenizers written in Python fail on such ids, each in a way of its own
        known_ids = set(tokenizer.get_vocab().values())
        rows = [[i for i in row if i in known_ids] for row in rows]
        return list(tokenizer.batch_decode(rows, **DECODING | changes))


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each of T ids adds to the text of those before it, special tokens by their names.

    Of ids that make a character together, all but the last add nothing. Texts begin and end between whole
    characters, as a part of one may spoil whole ones beside it.
    """
    added = []
    ends = [0]  # after which ids the text is whole
    for t in range(len(ids)):
        start = ends[bisect_right(ends, max(0, t - MARGIN)) - 1]
        parts = ids[start : ends[-1]], ids[start : t + 1]
        before, after = decoded(tokenizer, parts, skip_special_tokens=False)
        is_whole = not after.endswith("\ufffd")  # which is written for the bytes of a part
        added.append(after[len(before) :] if is_whole else "")
        if is_whole:
            ends.append(t + 1)
    return added
