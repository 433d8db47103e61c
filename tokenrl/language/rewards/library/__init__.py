"""Rewards that people use, ready to be named.

Each class makes a reward with TRL's signature, for text and for chat messages. On the command line it has the
name in `LIBRARY`, with its fields as options: `--reward numeric_answer "length(target=20)"`. What a model
wrote is parsed and never evaluated.
"""

from typing import Any

from tokenrl.language.rewards.library.answers import ExactMatch, NumericAnswer, final_number
from tokenrl.language.rewards.library.texts import Length, RegexFormat, Repetition, Sentiment, ValidJson

__all__ = [
    "LIBRARY",
    "ExactMatch",
    "Length",
    "NumericAnswer",
    "RegexFormat",
    "Repetition",
    "Sentiment",
    "ValidJson",
    "final_number",
]

LIBRARY: dict[str, Any] = {
    "exact_match": ExactMatch,
    "numeric_answer": NumericAnswer,
    "regex_format": RegexFormat,
    "length": Length,
    "repetition": Repetition,
    "valid_json": ValidJson,
    "sentiment": Sentiment,
}
